"""One Atari game from one command: train Drama on it, evaluate it, print the score.

    python -m experiments.atari100k --game Breakout --preset tiny

Steps are agent steps; one step is four emulator frames, so the default of 100,000 steps is 400,000 frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from drama_jax.config import AgentConfig, ConfigError, RunConfig
from drama_jax.envs import Env, make_atari
from drama_jax.envs.base import EmulatorError
from drama_jax.envs.games import canonical_game
from drama_jax.training import checkpoint, evaluation, loop, resume, run_directory, scores
from drama_jax.training.checkpoint import Checkpoints, Snapshot
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.replay_log import Segment
from drama_jax.training.signals import stop_requested
from experiments import command_line

_PROGRAM = "python -m experiments.atari100k"


class Failed(RuntimeError):  # noqa: N818 - the run did, not this program
    """The run ended early through no mistake of the user; the message says why."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, locked, and where the run stands."""

    game: str
    config: RunConfig
    preset: str
    directory: pathlib.Path
    identity: str
    snapshot: Snapshot | None
    """Where to go on from; None to start at step 0."""
    segments: list[Segment]
    """The replay on disk."""

    @property
    def step(self) -> int:
        """Agent steps done."""
        return 0 if self.snapshot is None else self.snapshot.step


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code.

    0: it is finished, or a signal ended it and it is saved. 1: it failed on the way. 2: a mistake of the user. One
    line explains each of the last two.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options, config = command_line.parse(arguments, _PROGRAM)
        if options.deterministic:
            make_deterministic()
        jax.config.update("jax_debug_nans", options.debug_nans)
        with stop_requested() as stop:
            directory, finished = run(options, config, stop)
        if not finished:
            print(f"stopped; to continue:\n{command_line.to_continue(arguments, _PROGRAM, directory)}", flush=True)
    except (ConfigError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: the device has not enough memory ({' '.join(str(error).split())[:200]}); lower the batch sizes or "
            f"--agent.replay.capacity",
            file=sys.stderr,
        )
        return 1
    return 0


def run(
    options: command_line.AllOptions, config: RunConfig, stop: Callable[[], bool] = lambda: False
) -> tuple[pathlib.Path, bool]:
    """Trains and evaluates, or goes on with that. Everything is checked before a run directory is created.

    Returns:
      The run directory, and whether the run is finished (it is not if `stop` has ended it).

    Raises:
      ConfigError: if the run cannot start.
      Failed: if the emulator failed, or the last checkpoint could not be saved.
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
    with contextlib.ExitStack() as stack:
        with contextlib.closing(make_environment(game, config, num_envs=1)) as environment:
            this = prepare(options, game, config, stack)
            if this.snapshot is None:
                state = loop.initial_state(init_key, config.agent, environment.num_actions)
            else:
                state = resume.restored_state(
                    this.directory, config, environment.num_actions, this.snapshot, this.segments
                )
            training, unsaved = train(this, environment, state, train_key, stop, check=options.check)
            del state
        if training.fault is not None:
            raise Failed(
                f"{training.fault}. What was learnt is saved in {this.directory}; the same command continues there"
            )
        returns = None if training.stopped else evaluate(this, training.state, evaluation_key, stop)
        if returns is not None:
            before = training.wall_clock_s - training.this_part_s
            report(this, training, returns, before + time.perf_counter() - start)
        if unsaved is not None:
            raise Failed(f"the last checkpoint of {this.directory} could not be saved ({unsaved})")
    return this.directory, returns is not None


def prepare(options: command_line.Options, game: str, config: RunConfig, stack: contextlib.ExitStack) -> Run:
    """Finds the run to continue or creates a new directory, and locks it until `stack` is closed.

    Raises:
      ConfigError: if it cannot be continued as asked for, or is in use.
    """
    directory = resume.find(options.logdir, game, options.preset, config, resume=options.resume, say=_say)
    if directory is None:
        directory = run_directory.create(options.logdir, game, options.preset, config)
        stack.enter_context(run_directory.lock(directory))
        print(f"run directory {directory}", flush=True)
        return Run(game, config, options.preset, directory, resume.read(directory)["id"], None, [])
    identity, changed = resume.check(directory, game, options.preset, config)
    stack.enter_context(run_directory.lock(directory))
    snapshot, segments = checkpoint.load(directory, identity, _say) or (None, [])
    step = 0 if snapshot is None else snapshot.step
    if step > config.steps:
        raise ConfigError(f"--steps {config.steps}: the run in {directory} has done {step} steps already")
    resume.note(directory, config, step, changed)
    resume.cut_metrics(directory, step)
    none = "" if snapshot is not None else ", as it has no checkpoint yet"
    print(f"run directory {directory}: going on from step {step}{none}", flush=True)
    resume.announce(changed, _say)
    return Run(game, config, options.preset, directory, identity, snapshot, segments)


def train(
    this: Run, environment: Env, state: Any, key: jax.Array, stop: Callable[[], bool], *, check: bool
) -> tuple[loop.Training, str | None]:
    """The training run with its files and its progress bar, and why its last checkpoint could not be saved, if so."""
    config = this.config
    with (
        contextlib.closing(Progress(config.steps, config.logging.progress, "training", this.step)) as progress,
        Writer(this.directory, config.logging, start=this.step, say=progress.say) as writer,
        contextlib.closing(
            Checkpoints(this.directory, this.identity, config.agent.replay.capacity, this.segments, progress.say)
        ) as checkpoints,
    ):

        def on_measured(seconds: float, steps_left: int) -> str | None:
            return slow_device_notice(this.preset, seconds, steps_left)

        training = loop.train(
            config,
            environment,
            state,
            key,
            writer=writer,
            progress=progress,
            checkpoints=checkpoints,
            snapshot=this.snapshot,
            stop=stop,
            on_measured=on_measured,
            check=check,
        )
        return training, checkpoints.error


def evaluate(this: Run, state: Any, key: jax.Array, stop: Callable[[], bool]) -> list[float] | None:
    """Plays the evaluation episodes and logs their mean; None if `stop` has ended it.

    Raises:
      Failed: if the emulator failed.
    """
    config, episodes = this.config, this.config.evaluation.episodes
    if episodes == 0:
        return []
    num_envs = min(config.evaluation.num_envs, episodes)
    with (
        contextlib.closing(Progress(episodes, config.logging.progress, "evaluation")) as progress,
        Writer(this.directory, config.logging, say=progress.say) as writer,
        contextlib.closing(make_environment(this.game, config, num_envs=num_envs, evaluation=True)) as environment,
    ):
        try:
            returns = evaluation.evaluate(
                state, environment, episodes, key, on_episode=lambda _: progress.advance(), stop=stop
            )
        except EmulatorError as error:
            raise Failed(f"the emulator failed in the evaluation: {error}. The same command repeats it") from error
        if returns is None:
            return None
        result = scores.summary(this.game, returns)
        values = {"eval/episodic_return": result["mean"], "eval/human_normalised_score": result["human_normalised"]}
        writer.scalars(config.steps, {tag: value for tag, value in values.items() if value is not None})
    return returns


def report(this: Run, training: loop.Training, returns: list[float], seconds: float) -> None:
    """Writes scores.json and prints the table."""
    result = scores.summary(this.game, returns) | {
        "game": this.game,
        "preset": this.preset,
        "seed": this.config.seed,
        "steps": this.config.steps,
        "training_returns": training.returns,
        "wall_clock_s": seconds,
        "training_s": training.wall_clock_s,
        "ms_per_step": training.ms_per_step,
        **run_directory.environment(),
    }
    print(scores.format_table(this.game, returns))
    try:
        scores.write(this.directory / "scores.json", result)
    except OSError as error:
        raise Failed(f"{this.directory / 'scores.json'}: {error.strerror}; the same command repeats it") from error


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
    """Raises a ConfigError if what must be in memory at once does not fit the device.

    Args:
      config: The agent's configuration.
      stats: The device's memory statistics; None where it keeps none, as on a CPU, whose memory is the machine's.
    """
    try:
        needed = memory_needed(config)
    except ConfigError as error:
        raise ConfigError(command_line.with_flags(str(error))) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"--agent: arrays of these sizes cannot be made ({' '.join(str(error).split())})") from error
    if stats and "bytes_limit" in stats:
        free, where = stats["bytes_limit"] - stats.get("bytes_in_use", 0), "device memory"
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        free, where = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory"
    else:
        return
    total = sum(needed.values())
    if total > free:
        flag = max(needed, key=lambda name: needed[name])
        raise ConfigError(
            f"{flag}: needs {needed[flag]:,} of {total:,} bytes of {where}, but {free:,} are free; lower it"
        )


def memory_needed(config: AgentConfig) -> dict[str, int]:
    """Flag -> bytes that it makes the agent take; less than in truth, as activations are left out."""

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = loop.shapes(config, num_actions=18)
    wm, im = config.world_model, config.imagination
    frame = math.prod(wm.autoencoder.image_shape)
    return {
        f"--agent.replay.capacity {config.replay.capacity}": size(state.replay),
        "--agent.world-model (sizes)": size(state.world_model),
        "--agent.behaviour (sizes)": size(state.behaviour),
        f"--agent.acting-context {config.acting_context}": config.acting_context * frame,
        f"--agent.world-model.batch-size {wm.batch_size}": wm.batch_size * wm.batch_length * frame,
        f"--agent.imagination.horizon {im.horizon}": im.batch_size * (im.horizon + 1) * wm.feature_size * 2,
    }


def keep_compiled_programs(directory: pathlib.Path | None) -> None:
    """Lets JAX keep compiled programs in `directory`, so that the next run starts at once; None leaves JAX as it is."""
    if directory is not None and str(directory).lower() != "none":
        try:
            path = directory.expanduser()
        except RuntimeError as error:
            raise ConfigError(f"--compilation-cache {directory}: {error}") from error
        jax.config.update("jax_compilation_cache_dir", str(path))


def make_deterministic() -> None:
    """Asks XLA for programs that give the same bits in every run; before JAX has started the device."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


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
