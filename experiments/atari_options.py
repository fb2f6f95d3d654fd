"""The command line of `experiments.atari100k`: a few plain flags, a preset, and a dotted flag for every field."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Literal

import tyro

from drama_jax.config import AtariConfig, ConfigError, RunConfig, preset
from experiments import command_line, run_options
from experiments.processes import Distributed
from experiments.sweep import Sweep

_PRESETS = ("tiny", "xs", "s", "reference")
_DESCRIPTION = """Trains Drama on one Atari game and evaluates it. Steps are agent steps: 1 step = 4 emulator frames.

Every other setting has a dotted flag, applied over the preset, for example
--agent.replay.tau 20, --atari.sticky-actions 0.25, --logging.no-tensorboard.
--help-all lists them with the chosen preset's values."""


@dataclasses.dataclass(frozen=True)
class Options(run_options.Options):
    """The flags that most runs need."""

    game: str
    """Atari game, for example Breakout or MsPacman."""
    preset: Literal["tiny", "xs", "s", "reference"]
    """tiny: minutes on a laptop CPU. xs: the paper's 7 M-parameter model. s: twice the autoencoder channels.
    reference: xs with the quirks of the released PyTorch code."""
    logdir: pathlib.Path
    """Runs go to LOGDIR/GAME/PRESET/seedK-TIME. May also be such a directory, to continue that run."""
    resume: bool
    """Continue the newest unfinished run of this game, preset and seed; --no-resume starts a new one."""
    env_backend: Literal["envpool", "ale"]
    """Emulator: EnvPool, or ale-py (python -m pip install -e '.[ale]')."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Options, run_options.AllOptions):
    """The flags that most runs need, and every other field."""

    atari: AtariConfig
    sweep: Sweep
    distributed: Distributed


def parse(arguments: Sequence[str], program: str) -> tuple[AllOptions, RunConfig]:
    """The options and the resolved configuration: the preset, then dotted flags, then plain flags.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help or --help-all.
    """
    name = command_line.chosen(arguments, "preset", "xs", _PRESETS)
    base = preset(name, *command_line.chosen_parts(arguments))
    default = functools.partial(
        run_options.defaults,
        base=base,
        game=tyro.MISSING,
        preset=name,
        env_backend=base.atari.backend,
        atari=base.atari,
        sweep=Sweep(),
        distributed=Distributed(),
    )
    run_options.show_help(arguments, (Options, AllOptions), program, _DESCRIPTION, default)
    options = command_line.parse_plain(AllOptions, arguments, program, None, default(AllOptions))
    try:
        return options, _resolve(options, base)
    except ConfigError as error:
        raise ConfigError(command_line.with_flags(str(error))) from None


def _resolve(options: AllOptions, base: RunConfig) -> RunConfig:
    atari = options.atari
    if options.env_backend != base.atari.backend:
        atari = dataclasses.replace(atari, backend=options.env_backend)
    return RunConfig(atari=atari, **run_options.resolve(options, base))
