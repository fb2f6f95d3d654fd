"""Plays evaluation episodes with a trained agent, from a checkpoint or from a file of weights.

    python -m experiments.evaluate --logdir runs/Pong/xs/seed0-...

The result goes to evaluation-<step>.json in the run directory. A run that was trained to its end has been evaluated
already (scores.json); this is for the checkpoints of one that was not, for more episodes, and for other machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax

from drama_jax.config import ConfigError, RunConfig, TaskRunConfig
from drama_jax.envs.base import EmulatorError
from drama_jax.training import checkpoint, config_file, evaluation, run_directory, scores
from drama_jax.training.logging import Progress
from experiments import saved
from experiments.command_line import parse_plain
from experiments.machine import make_environment

_PROGRAM = "python -m experiments.evaluate"


@dataclasses.dataclass(frozen=True)
class Options:
    """Which agent, and how it is evaluated."""

    logdir: pathlib.Path
    """A run directory with config.json."""
    weights: pathlib.Path | None = None
    """A file of weights (.npz) instead of a checkpoint of the run."""
    step: int | None = None
    """Which checkpoint; the newest if not given."""
    episodes: int = 100
    """Whole episodes to play."""
    num_envs: int = 20
    """Parallel environments; each plays the same number of episodes (+-1)."""
    seed: int = 1
    """Seed of the latents and the environments."""
    env_backend: Literal["envpool", "ale"] | None = None
    """Emulator; the run's if not given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit code: 0, 1 if the emulator failed, 2 after a mistake of the user."""
    try:
        options = parse_plain(Options, arguments, _PROGRAM, __doc__)
        game, returns, path = run(options)
        print(scores.format_table(game, returns))
        print(path)
    except (ConfigError, EmulatorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def run(options: Options) -> tuple[str, list[float], pathlib.Path]:
    """Plays the episodes and writes the result; returns game, returns and the file.

    Raises:
      ConfigError: if the run or its weights cannot be read, an option is wrong, or the result cannot be written.
      EmulatorError: an emulator failed.
    """
    game, config = config_file.load_any_config(options.logdir)
    config = _settings(game, config, options)
    num_envs = min(options.num_envs, options.episodes)
    with contextlib.closing(make_environment(game, config, num_envs=num_envs, evaluation=True)) as environment:
        step = checkpoint.newest(options.logdir) if options.weights is None and options.step is None else options.step
        state = saved.load(options.logdir, config, environment.num_actions, file=options.weights, step=step)
        with contextlib.closing(
            Progress(options.episodes, config.logging.progress, "evaluation", unit="episode")
        ) as progress:
            key = jax.random.key(options.seed)
            returns = evaluation.evaluate(
                state, environment, options.episodes, key, on_episode=lambda _: progress.advance()
            )
    assert returns is not None  # nothing stops it
    # What tells this evaluation from others of the run.
    label = str(step) if options.weights is None else options.weights.stem
    path = options.logdir / f"evaluation-{label}.json"
    result: dict[str, Any] = scores.summary(game, returns) | {
        "game": game,
        "weights": options.weights.name if options.weights else f"checkpoint {label}",
        "num_envs": num_envs,
        "seed": options.seed,
        "env_backend": config.atari.backend if isinstance(config, RunConfig) else "envpool",
        **run_directory.environment(),
    }
    try:
        scores.write(path, result)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return game, returns, path


def _settings(game: str, config: RunConfig | TaskRunConfig, options: Options) -> RunConfig | TaskRunConfig:
    """The run's configuration with the options' seed, episodes and emulator."""
    for name in ("episodes", "num_envs"):
        value = getattr(options, name)
        if not 1 <= value <= 4096:
            raise ConfigError(f"--{name.replace('_', '-')} must lie in [1, 4096], got {value}")
    if isinstance(config, TaskRunConfig):
        if options.env_backend not in (None, "envpool"):
            raise ConfigError(f"--env-backend {options.env_backend}: {game} is played through envpool only")
        return dataclasses.replace(config, seed=options.seed)
    atari = config.atari
    if options.env_backend is not None:
        atari = dataclasses.replace(atari, backend=options.env_backend)
    # The evaluation's environments get the seed after the run's.
    return dataclasses.replace(config, atari=atari, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
