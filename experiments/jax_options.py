"""The flags of `experiments.jax_env`."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

from drama_jax.config import AgentConfig, AutoencoderConfig, ConfigError
from drama_jax.envs import jax_env
from experiments import command_line, run_options
from experiments.jax_presets import PRESETS, InGraphConfig, LoggingConfig, fitted

PROGRAM = "python -m experiments.jax_env"
_MOST_SEEDS = 1024
_DESCRIPTION = """Trains Drama on an environment written in JAX, several seeds at once, all of it on the device.

Every other setting has a dotted flag, applied over the preset, for example
--agent.replay.sampler uniform, --agent.behaviour.name ppo, --agent.world-model.backbone.name gru.
--help-all lists them with the chosen preset's values."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that most runs need."""

    env: str
    """Environment of gymnax, for example Catch-bsuite or Breakout-MinAtar, or MODULE:CLASS with gymnax's interface."""
    preset: Literal["tiny", "minatar", "vector", "small", "xs"]
    """tiny: learns Catch in minutes on a laptop CPU. minatar: MinAtar's games on a CPU. vector: of tiny's size, the
    default where observations are vectors. small: between tiny and xs, for MinAtar on a GPU. xs: the paper's model of
    7 M parameters, 64 x 64 pixels. Other images are as small as the environment allows."""
    steps: int
    """Agent steps to train for."""
    seed: int
    """The first seed."""
    seeds: int
    """Agents to train in one program, of seeds SEED, SEED + 1, ...; each has its own run directory."""
    devices: int | None
    """GPUs of this machine to share the agents out to; as many as divide their number if not given."""
    logdir: pathlib.Path
    """Runs go to LOGDIR/ENV/PRESET/seedK-TIME."""
    picture: pathlib.Path | None
    """PNG of the learning curves of all seeds (needs matplotlib)."""
    data: pathlib.Path | None
    """JSON of the same."""
    random_episodes: int
    """Whole episodes of uniformly random actions that each seed is compared with; 0 for none."""
    compilation_cache: pathlib.Path | None
    """Where compiled programs are kept for the next run; None to keep none."""
    resume: bool
    """Continue the newest unfinished runs of this environment, preset and seeds; --no-resume starts new ones."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Options):
    """The flags that most runs need, and every other field."""

    agent: AgentConfig
    logging: LoggingConfig
    max_skipped_updates: int
    """Stop after so many updates in a row whose loss or gradient was not finite; each is skipped and counted."""


def parse(arguments: Sequence[str] | None) -> tuple[AllOptions, InGraphConfig, jax_env.JaxEnv]:
    """The options, the resolved configuration of the first seed, and the environment.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help or --help-all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    preset = command_line.chosen(arguments, "preset", "tiny", tuple(PRESETS))
    base = PRESETS[preset]()
    for flag, kind in {"--help-all": AllOptions, "--help": Options, "-h": Options}.items():
        if flag in arguments:
            command_line.parse_plain(kind, ["--help"], PROGRAM, _DESCRIPTION, _defaults(kind, preset, base))
    name = _env(arguments)
    try:
        env, params = jax_env.load(name)
        shape = jax_env.observation_shape(env, params)
    except ConfigError as error:
        raise ConfigError(f"--env: {error}") from None
    if len(shape) == 1 and command_line.given(arguments, "preset") is None:
        preset, base = "vector", PRESETS["vector"]()
    base = dataclasses.replace(base, env=name, agent=fitted(base.agent, shape))
    options = command_line.parse_plain(AllOptions, arguments, PROGRAM, None, _defaults(AllOptions, preset, base))
    if not 1 <= options.seeds <= _MOST_SEEDS:
        raise ConfigError(f"--seeds must be an integer from 1 to {_MOST_SEEDS}, got {options.seeds}")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(InGraphConfig)}
    try:
        config = InGraphConfig(**fields)
        shown = jax_env.JaxEnv(env, params, config.agent.world_model.autoencoder.image_size)
    except ConfigError as error:
        message = command_line.with_flags(str(error))
        raise ConfigError(message if message.startswith("--") else f"--env: {message}") from None
    _check_observations(name, config.agent.world_model.autoencoder, shape)
    return options, config, shown


def _check_observations(name: str, autoencoder: AutoencoderConfig, shape: tuple[int, ...]) -> None:
    """Raises a ConfigError if flags ask for another kind of observation than the environment's."""
    size = shape[0] if len(shape) == 1 else 0
    if autoencoder.vector_size != size:
        raise ConfigError(
            f"--agent.world-model.autoencoder.vector-size must be {size} for {name}, got {autoencoder.vector_size}"
        )
    if len(shape) == 3 and autoencoder.image_channels != shape[2]:
        raise ConfigError(
            f"--agent.world-model.autoencoder.image-channels must be {shape[2]} for {name}, got "
            f"{autoencoder.image_channels}"
        )


def _env(arguments: Sequence[str]) -> str:
    """What --env is given, because it decides the defaults of others."""
    name = command_line.given(arguments, "env")
    if name is None:
        raise ConfigError("--env is missing; name a JAX environment, for example --env Catch-bsuite")
    return name


def _defaults(kind: type[Any], preset: str, base: InGraphConfig) -> Any:
    """The preset's values, as the defaults of the flags."""
    return run_options.filled(kind, base, env=base.env, preset=preset, picture=None, data=None, random_episodes=100)
