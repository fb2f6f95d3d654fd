"""One Atari game from one command: train Drama on it, evaluate it, print the score.

    python -m experiments.atari100k --game Breakout --preset tiny

Steps are agent steps; one step is four emulator frames, so the default of 100,000 steps is 400,000 frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from drama_jax import replay
from drama_jax.config import AgentConfig, ConfigError, RunConfig
from drama_jax.envs import Env, make_atari
from drama_jax.envs.games import canonical_game
from drama_jax.training import evaluation, loop, run_directory, scores
from drama_jax.training.checkpoint import Checkpoints
from drama_jax.training.logging import Progress, Writer
from experiments import command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code: 0, or 2 after a mistake of the user, which one line explains."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options, config = command_line.parse(arguments, "python -m experiments.atari100k")
        run(options, config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: command_line.Options, config: RunConfig) -> pathlib.Path:
    """Trains and evaluates; returns the run directory. Everything is checked before that directory is created.

    Raises:
      ConfigError: if the run cannot start.
    """
    start = time.perf_counter()
    try:
        game = canonical_game(options.game)
    except ConfigError as error:
        raise ConfigError(f"--game: {error}") from None
    run_directory.check(options.logdir)
    check_memory(config.agent, jax.devices()[0].memory_stats())
    keep_compiled_programs(options.compilation_cache)
    init_key, train_key, evaluation_key = jax.random.split(jax.random.key(config.seed), 3)
    with contextlib.closing(make_environment(game, config, num_envs=1)) as environment:
        directory = run_directory.create(options.logdir, game, options.preset, config)
        print(f"run directory {directory}", flush=True)
        state = loop.initial_state(init_key, config.agent, environment.num_actions)
        training = train(options.preset, config, directory, environment, state, train_key)
    returns = evaluate(game, config, directory, training.state, evaluation_key)
    result = scores.summary(game, returns) | {
        "game": game,
        "preset": options.preset,
        "seed": config.seed,
        "steps": config.steps,
        "training_returns": training.returns,
        "wall_clock_s": time.perf_counter() - start,
        "training_s": training.wall_clock_s,
        "ms_per_step": training.ms_per_step,
        **run_directory.environment(),
    }
    scores.write(directory / "scores.json", result)
    print(scores.format_table(game, returns))
    return directory


def train(
    preset: str, config: RunConfig, directory: pathlib.Path, environment: Env, state: Any, key: jax.Array
) -> loop.Training:
    """The training run with its files and its progress bar."""
    with (
        Writer(directory, config.logging) as writer,
        contextlib.closing(Checkpoints(directory / "checkpoints")) as checkpoints,
        contextlib.closing(Progress(config.steps, config.logging.progress, "training")) as progress,
    ):

        def on_measured(seconds: float, steps_left: int) -> str | None:
            return slow_device_notice(preset, seconds, steps_left)

        return loop.train(
            config,
            environment,
            state,
            key,
            writer=writer,
            progress=progress,
            checkpoints=checkpoints,
            on_measured=on_measured,
        )


def evaluate(game: str, config: RunConfig, directory: pathlib.Path, state: Any, key: jax.Array) -> list[float]:
    """Plays the evaluation episodes and logs their mean."""
    episodes = config.evaluation.episodes
    if episodes == 0:
        return []
    num_envs = min(config.evaluation.num_envs, episodes)
    with (
        Writer(directory, config.logging) as writer,
        contextlib.closing(make_environment(game, config, num_envs=num_envs, evaluation=True)) as environment,
        contextlib.closing(Progress(episodes, config.logging.progress, "evaluation")) as progress,
    ):
        returns = evaluation.evaluate(state, environment, episodes, key, on_episode=lambda _: progress.advance())
        result = scores.summary(game, returns)
        values = {"eval/episodic_return": result["mean"], "eval/human_normalised_score": result["human_normalised"]}
        writer.scalars(config.steps, {tag: value for tag, value in values.items() if value is not None})
    return returns


def make_environment(game: str, config: RunConfig, *, num_envs: int, evaluation: bool = False) -> Env:
    """The training environment, or those of the evaluation with their own seeds and step limit.

    Raises:
      ConfigError: if the emulator is missing or refuses its settings.
    """
    atari, seed = config.atari, config.seed
    if evaluation:
        atari = dataclasses.replace(atari, max_episode_steps=config.evaluation.max_episode_steps)
        seed += 1  # the training environment has one seed only
    image_size = config.agent.world_model.autoencoder.image_size
    try:
        return make_atari(game, atari, num_envs=num_envs, image_size=image_size, seed=seed)
    except ConfigError as error:
        message = command_line.with_flags(str(error))
        raise ConfigError(
            message if message.startswith("--") else f"--env-backend {atari.backend}: {message}"
        ) from None


def check_memory(config: AgentConfig, stats: dict[str, int] | None) -> None:
    """Raises a ConfigError if the replay alone does not fit the device.

    Args:
      config: The agent's configuration.
      stats: The device's memory statistics; None where it keeps none, as on a CPU.
    """
    if not stats or "bytes_limit" not in stats:
        return
    shapes = jax.eval_shape(lambda: replay.init(config.replay, config.world_model.autoencoder.image_shape))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > free:
        raise ConfigError(
            f"--agent.replay.capacity {config.replay.capacity}: the replay needs {needed:,} bytes of device memory and "
            f"{free:,} are free; lower it, or free memory on the device"
        )


def keep_compiled_programs(directory: pathlib.Path | None) -> None:
    """Lets JAX keep compiled programs in `directory`, so that the next run starts at once; None leaves JAX as it is."""
    if directory is not None and str(directory).lower() != "none":
        jax.config.update("jax_compilation_cache_dir", str(directory.expanduser()))


def slow_device_notice(preset: str, seconds: float, steps_left: int) -> str | None:
    """How long the run will take, for a run on a CPU of any preset but tiny."""
    if preset == "tiny" or jax.default_backend() != "cpu":
        return None
    total = seconds * steps_left
    unit, size = next((pair for pair in (("days", 86_400), ("hours", 3_600)) if total > 2 * pair[1]), ("minutes", 60))
    return (
        f"No GPU found: at {seconds:.2g} s per step the remaining {steps_left:,} steps take about "
        f"{total / size:.1f} {unit} on this CPU. `--preset tiny` ends in minutes. Going on."
    )


if __name__ == "__main__":
    sys.exit(main())
