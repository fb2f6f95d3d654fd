"""Drama on an environment written in JAX, the whole run on the device, many seeds at once.

    python -m experiments.jax_env --env Catch-bsuite --seeds 5 --picture catch.png

Environment, replay, sampler, acting, updates and their metrics are one jitted `lax.scan`, vmapped over the seeds. It is
run in chunks of `--logging.metrics-every` steps: in between, metrics and episodes are written, each seed's in the
run directory that it would have alone (LOGDIR/ENV/PRESET/seedK-TIME), and the run can be stopped.

SIGTERM, SIGHUP and Ctrl-C end it at the end of a chunk, and save; the same command continues, on a CPU with the same
bits. A checkpoint holds the whole replay. Needs gymnax (in the extra `drama_jax[gymnax]`), or an environment of your
own with its interface: `--env MODULE:CLASS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax import agent
from drama_jax.config import LoggingConfig as WriterConfig
from drama_jax.envs.jax_env import JaxEnv
from drama_jax.training import arrays, in_graph, run_directory, scores
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.logging import Progress, Writer, say
from drama_jax.training.signals import stop_requested
from drama_jax.training.together import Together
from experiments import jax_curves, machine, memory, runs
from experiments.exits import Failed, exit_code
from experiments.jax_options import AllOptions, parse
from experiments.jax_presets import InGraphConfig
from experiments.runs import Run
from experiments.sweep import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code, see `exits.exit_code`."""

    def command() -> None:
        options, config, env = parse(arguments)
        with stop_requested() as stop:
            directories = run(options, config, env, stop)
        if directories is None:
            say("stopped; the same command continues", sys.stdout)
            return
        results = jax_curves.collect(directories)
        results |= jax_curves.random_play(env, results["seeds"], options.random_episodes)
        print(jax_curves.table(results))
        jax_curves.write(results, options.data, options.picture)

    return exit_code(command)


def run(
    options: AllOptions, config: InGraphConfig, env: JaxEnv, stop: Callable[[], bool] = lambda: False
) -> list[pathlib.Path] | None:
    """Trains all seeds, or goes on with that. Everything is checked before a run directory is created.

    Returns:
      The seeds' run directories; None if `stop` has ended it.

    Raises:
      ConfigError: if it cannot start.
      Failed: if updates were not finite, or a last checkpoint could not be saved.
    """
    jax_curves.check(options.data, options.picture)
    jax_curves.check_random_episodes(options.random_episodes)
    run_directory.check(options.logdir)
    planned = plan(config, options.seeds)
    devices = machine.choose_devices(options.devices, len(planned))
    memory.check_memory(config.agent, devices[0].memory_stats(), len(planned) // len(devices))
    machine.keep_compiled_programs(options.compilation_cache)
    name = config.env.rpartition(":")[2]
    with contextlib.ExitStack() as stack:
        begun = runs.prepare(options, name, planned, stack)
        finished = train(begun, config, env, options.devices, stop)
    if not finished:
        return None
    directories = {one.config.seed: one.directory for one in begun}
    found = [directories.get(one.config.seed) or runs.finished(options, name, one) for one in planned]
    return [directory for directory in found if directory is not None]


def train(
    members: Sequence[Run[InGraphConfig]],
    config: InGraphConfig,
    env: JaxEnv,
    devices: int | None,
    stop: Callable[[], bool],
) -> bool:
    """Trains seeds that are at one step, chunk by chunk, and writes their files; whether to the end.

    Raises:
      Failed: if updates were not finite, or a last checkpoint could not be saved.
    """
    together = Together(len(members), machine.share_out(len(members), devices))
    with contextlib.ExitStack() as stack:
        bar = Progress(config.steps, config.logging.progress, "training", members[0].step)
        progress = stack.enter_context(contextlib.closing(bar))
        files = [stack.enter_context(_Files(one, config, progress)) for one in members]
        loop = _start(members, config, env, together)
        done = saved = members[0].step
        skipped = 0
        for chunk in chunks(config, env, done):
            before = time.perf_counter()
            program = (
                functools.partial(_run_one, chunk) if together.count == 1 else together.program(chunk, donated=True)
            )
            loop, history, metrics = program(loop)
            done += chunk.steps
            history, metrics = jax.device_get((history, metrics))
            seconds = time.perf_counter() - before
            for index, one in enumerate(files):
                one.write(done, seconds, together.of_host(vars(history), index), together.of_host(metrics, index))
            for _ in range(chunk.steps):
                progress.advance()
            skipped = int(np.max(metrics["guard/skipped_in_a_row"]))
            end = done == config.steps or stop() or skipped >= config.max_skipped_updates
            if end or done // config.logging.checkpoint_every > saved // config.logging.checkpoint_every:
                saved = done
                values = arrays.to_host(loop)
                for index, one in enumerate(files):
                    one.save(done, together.of_host(values, index))
            if end:
                break
        problems = [one.finish(done == config.steps) for one in files]
    if skipped >= config.max_skipped_updates:
        problems.append(f"loss or gradient were not finite in the last {skipped} updates; what was learnt is saved")
    if any(problems):
        raise Failed("; ".join(filter(None, problems)))
    return done == config.steps


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some steps of one agent as a function of its loop; equal ones share a compiled program."""

    env: JaxEnv
    random: bool
    """Of the warm-up, not of the policy."""
    steps: int

    def __call__(self, loop: in_graph.Loop) -> tuple[in_graph.Loop, in_graph.History, agent.Metrics]:
        """The loop afterwards, what happened, and by TensorBoard tag the updates' mean metrics and the state's last."""
        metrics: agent.Metrics = {}
        if self.random:
            loop, history = in_graph.play_randomly(self.env, self.steps, loop)
        else:
            loop, history, metrics = in_graph.train(self.env, self.steps, loop)
        means = jax.tree.map(lambda values: values.mean(), metrics)
        return loop, history, means | agent.state_metrics(loop.agent)


def chunks(config: InGraphConfig, env: JaxEnv, done: int) -> Iterator[Chunk]:
    """What is left of a run at step `done`: the rest of the warm-up, then equal chunks, the last perhaps shorter."""
    while done < config.steps:
        random = done < config.agent.warmup_steps
        end = min(config.steps, config.agent.warmup_steps if random else done + config.logging.metrics_every)
        yield Chunk(env, random, end - done)
        done = end


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run_one(chunk: Chunk, loop: in_graph.Loop) -> Any:
    return chunk(loop)


def _start(
    members: Sequence[Run[InGraphConfig]], config: InGraphConfig, env: JaxEnv, together: Together
) -> in_graph.Loop:
    """The loops of all seeds, fresh or from their checkpoints, stacked."""
    # Run once, so that on a CPU it is compiled fast rather than well.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    begin = jax.jit(in_graph.begin, static_argnums=(0, 1), compiler_options=quick)
    loops = []
    for index, one in enumerate(members):
        with jax.default_device(together.device(index)):
            if one.snapshot is None:
                loops.append(begin(config.agent, env, jax.random.key(one.config.seed)))
            else:
                shapes = begin.eval_shape(config.agent, env, jax.random.key(0))
                loops.append(arrays.from_host(shapes, one.snapshot.device))
    return together.stack(loops)


class _Files:
    """What one seed writes. A context manager."""

    def __init__(self, run: Run[InGraphConfig], config: InGraphConfig, progress: Progress) -> None:
        self._run, self._config = run, config
        tensorboard = WriterConfig(tensorboard=config.logging.tensorboard)
        self._writer = Writer(run.directory, tensorboard, start=run.step, say=progress.say)
        self._checkpoints = Checkpoints(run.directory, run.identity, 1, run.segments, progress.say)
        self._seconds = 0.0 if run.snapshot is None else run.snapshot.header["seconds"]

    def write(self, done: int, seconds: float, history: dict[str, np.ndarray], metrics: dict[str, np.ndarray]) -> None:
        """The episodes and the metrics of a chunk that ended with step `done`."""
        steps, before = len(history["lasts"]), self._seconds
        self._seconds += seconds
        for index in np.flatnonzero(history["lasts"]):
            values = {
                "charts/episodic_return": float(history["returns"][index]),
                "charts/episodic_length": float(history["lengths"][index]),
            }
            step = int(index) + 1  # of the chunk; when within it nobody has looked, so its time is shared out evenly
            self._writer.scalars(done - steps + step, before + seconds * step / steps, values)
        values = {tag: float(value) for tag, value in metrics.items()} | {"charts/SPS": steps / seconds}
        self._writer.scalars(done, self._seconds, values)

    def save(self, done: int, values: dict[str, np.ndarray]) -> None:
        """Starts to write a checkpoint of step `done`."""
        # The replay is among the arrays: no segment of it belongs to the checkpoint.
        self._checkpoints.save(Snapshot(done, 0, values, {"seconds": self._seconds}, {}))

    def finish(self, to_the_end: bool) -> str | None:
        """Waits for the last checkpoint, writes scores.json; what could not be saved, as a line."""
        self._checkpoints.wait()
        directory, config = self._run.directory, self._run.config
        if self._checkpoints.problem is not None:
            return self._checkpoints.problem
        if to_the_end:
            result = {
                "env": self._config.env,
                "preset": self._run.preset,
                "seed": config.seed,
                "steps": config.steps,
                "training_returns": jax_curves.episodes(directory),
                "wall_clock_s": self._seconds,
                **run_directory.environment(),
            }
            try:
                scores.write(directory / "scores.json", result)
            except OSError as error:
                return f"{directory / 'scores.json'}: {error.strerror}; the same command repeats it"
        return None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoints.close()
        self._writer.close()


if __name__ == "__main__":
    sys.exit(main())
