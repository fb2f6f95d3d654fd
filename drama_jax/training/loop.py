"""The host loop: one environment, one update of the agent per agent step.

    step t:    start act on frame t  ->  start the update with transition t-1  ->  fetch the action  ->  emulator plays

Python waits for the device only at the action. What crosses to the device per step is one frame, an action and three
scalars. In this file E = 1 environment; arrays from the environment keep that axis.

Between two steps the whole run is what `_Loop.snapshot` holds, and the rows of the replay.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drama_jax import agent, replay
from drama_jax.config import AgentConfig, RunConfig
from drama_jax.envs.base import EmulatorError, Env, Observation, StateMismatch, play
from drama_jax.training import arrays, images, replay_log
from drama_jax.training.checkpoint import Checkpoints, Snapshot
from drama_jax.training.logging import MeanMetrics, Progress, Writer
from drama_jax.training.replay_log import Row

_MEASURED_UPDATES = 3


@dataclasses.dataclass
class Training:
    """What came of a training run."""

    state: Any
    """AgentState after the last update."""
    returns: list[tuple[int, float]]
    """(agent step at the end, undiscounted raw return) of each episode, whole games with the terminal reward."""
    wall_clock_s: float
    """Of all parts of a run that was interrupted."""
    this_part_s: float
    """Of the last of them."""
    ms_per_step: float | None
    """Median time of a step with an update, over all parts; None if there was no update."""
    stopped: int | None = None
    """The agent step at which `stop` ended it; None if it was trained to its end."""
    fault: str | None = None
    """Why the emulator failed and ended the training; None if it did not."""


@dataclasses.dataclass
class _Pending:
    """A transition that the agent has not been given yet."""

    row: Row
    frames: jax.Array  # [1, H, W, C] uint8, those of the row, already on the device

    def arrays(self) -> tuple[Any, ...]:
        return self.frames, *self.row[1:]


def _transition(*arrays: jax.Array) -> replay.Transition:
    return replay.Transition(*(array[0] for array in arrays))


def shapes(config: AgentConfig, num_actions: int) -> Any:
    """What `initial_state` would return, as shapes and types."""
    return jax.eval_shape(lambda key: agent.init(key, config, num_actions), jax.random.key(0))


def initial_state(key: jax.Array, config: AgentConfig, num_actions: int) -> Any:
    """`agent.init` as one compiled program; run once, so that on a CPU it is compiled fast rather than well."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(agent.init, static_argnums=(1, 2), compiler_options=options)(key, config, num_actions)


@jax.jit
def _act(state: Any, acting: Any, frames: jax.Array, key: jax.Array, step: int, first: jax.Array) -> Any:
    """Sampled action; the key of a step is derived from the run's by the step's number."""
    return agent.act(state, acting, frames, jax.random.fold_in(key, step), first)


def _observe(state: Any, *arrays: jax.Array) -> Any:
    return agent.observe(state, _transition(*arrays))


def _update(state: Any, *arrays: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    return agent.update(state, _transition(*arrays))


observe = jax.jit(_observe, donate_argnums=0)
update = jax.jit(_update, donate_argnums=0)


def train(
    config: RunConfig,
    environment: Env,
    state: Any,
    key: jax.Array,
    *,
    writer: Writer,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    snapshot: Snapshot | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_measured: Callable[[float, int], str | None] = lambda seconds, steps_left: None,
) -> Training:
    """Trains until `config.steps` agent steps are done.

    Uniformly random actions for the first `warmup_steps`, then the policy's, with one update per step.

    Args:
      config: The run's configuration.
      environment: One environment (`num_envs` 1), freshly made.
      state: `AgentState`, fresh or that of `snapshot`; donated, do not use it afterwards.
      key: PRNG key, consumed.
      writer: Where scalars and images go.
      progress: The progress bar.
      checkpoints: Where checkpoints go, one every `logging.checkpoint_every` steps, one at the end, and one where the
        training is ended early.
      snapshot: Where to go on from; None to start at step 0.
      stop: Asked after every step; True saves and ends the training.
      on_measured: Called once with (seconds per step, steps left) after the first measured updates; what it returns is
        shown to the user.
    """
    loop = _Loop(config, environment, state, key, writer, progress, checkpoints, stop, on_measured)
    return loop.run(snapshot)


class _Loop:
    """The state of `train`, so that its steps can be read one by one."""

    def __init__(
        self,
        config: RunConfig,
        environment: Env,
        state: Any,
        key: jax.Array,
        writer: Writer,
        progress: Progress,
        checkpoints: Checkpoints | None,
        stop: Callable[[], bool],
        on_measured: Callable[[float, int], str | None],
    ) -> None:
        self.config, self.environment, self.state = config, environment, state
        self.writer, self.progress, self.checkpoints = writer, progress, checkpoints
        self.stop, self.on_measured = stop, on_measured
        self.act_key, self.image_key, warmup_key = jax.random.split(key, 3)
        self.warmup_rng = np.random.default_rng(np.asarray(jax.random.bits(warmup_key, (4,))))
        self.acting = agent.initial_acting(state, 1)
        self.metrics = MeanMetrics()
        self.fed = 0  # transitions the agent has been given
        self.pending: _Pending | None = None
        self.episode_return, self.episode_length = 0.0, 0
        self.returns: list[tuple[int, float]] = []
        self.step_seconds: list[float] = []
        self.unmeasured = 0  # of these, how many are of earlier parts of the run
        self.seconds_before = 0.0  # wall clock of earlier parts of the run
        self.start = time.perf_counter()
        self.interval_start = self.start, 0  # (time, step) at which the metrics interval began

    def run(self, snapshot: Snapshot | None) -> Training:
        done = 0 if snapshot is None else snapshot.step
        self.interval_start = self.start, done
        first, acting = done, self.acting
        stopped = fault = None
        try:
            observation = self.environment.reset() if snapshot is None else self.go_on(snapshot)
            for step in range(done, self.config.steps):
                before = time.perf_counter()
                acting = self.acting
                observation = self.step(step, observation)
                done = step + 1
                if done == self.config.steps:
                    self.feed()
                self.record(done)
                if step > self.config.agent.warmup_steps:
                    self.step_seconds.append(time.perf_counter() - before)
                    self.estimate(done)
                self.progress.advance()
                if self.stop():
                    stopped = done
                    break
        except EmulatorError as error:
            fault = f"the emulator failed in step {done}: {error}"
            self.acting = acting  # the step will be taken again
        if self.checkpoints is not None:
            if done > first and (stopped is not None or fault is not None):
                self.save(self.checkpoints, done)
            self.checkpoints.wait()
        jax.block_until_ready(self.state)
        median = 1e3 * float(np.median(self.step_seconds)) if self.step_seconds else None
        seconds = self.seconds()
        return Training(
            self.state, self.returns, seconds, seconds - self.seconds_before, median, stopped=stopped, fault=fault
        )

    def step(self, step: int, observation: Observation) -> Observation:
        """One agent step from `observation`; returns the observation to act on next."""
        # A copy, because on CPU the device array might otherwise share the environment's memory.
        frames = jax.device_put(observation.frames, may_alias=False)
        chosen = self.choose(step, frames, observation.first)
        # Queued before the action is fetched, so that the device goes from one to the other without waiting for Python;
        # it works through this update while the emulator plays.
        self.feed()
        actions = np.asarray(chosen)  # waits for the action alone
        after = play(self.environment, actions)
        # A second call resets, whatever the action: it is no agent step and its row is not stored.
        following = play(self.environment, actions) if after.last[0] else after
        row = Row(observation.frames, actions, after.rewards, after.terminals, observation.first)
        self.pending = _Pending(row, frames)
        self.episode_return += float(after.rewards[0])
        self.episode_length += 1
        if after.last[0]:
            self.end_episode(step + 1)
        return following

    def choose(self, step: int, frames: jax.Array, first: np.ndarray) -> np.ndarray | jax.Array:
        """[1] int32: random during warm-up, then from the policy. Does not wait for the device."""
        if step < self.config.agent.warmup_steps:
            return self.warmup_rng.integers(self.environment.num_actions, size=1, dtype=np.int32)
        actions, self.acting = _act(self.state, self.acting, frames, self.act_key, step, first)
        return actions

    def feed(self) -> None:
        """Gives the agent the pending transition: only stored during warm-up, with an update afterwards."""
        if self.pending is None:
            return
        transition = self.pending.arrays()
        if self.checkpoints is not None:
            self.checkpoints.add(self.pending.row)
        self.pending = None
        if self.fed < self.config.agent.warmup_steps:
            self.state = observe(self.state, *transition)
        else:
            self.state, metrics = update(self.state, *transition)
            self.metrics.add(metrics)
        self.fed += 1

    def end_episode(self, steps_done: int) -> None:
        """Logs the episode that has just ended."""
        self.returns.append((steps_done, self.episode_return))
        self.writer.scalars(
            steps_done,
            {"charts/episodic_return": self.episode_return, "charts/episodic_length": float(self.episode_length)},
        )
        self.progress.show(last_return=f"{self.episode_return:g}")
        self.episode_return, self.episode_length = 0.0, 0

    def record(self, steps_done: int) -> None:
        """Writes metrics, images and checkpoints where they are due: at intervals and at the end."""
        logging, end = self.config.logging, steps_done == self.config.steps
        if end or steps_done % logging.metrics_every == 0:
            values = self.metrics.fetch() | jax.device_get(_sampler_metrics(self.state))
            now = time.perf_counter()
            then, step_then = self.interval_start
            self.interval_start = now, steps_done
            self.writer.scalars(steps_done, {**values, "charts/SPS": (steps_done - step_then) / (now - then)})
        if (end or steps_done % logging.images_every == 0) and self.fed > self.config.agent.warmup_steps:
            images.log(self.writer, steps_done, self.state, jax.random.fold_in(self.image_key, steps_done))
        if (end or steps_done % logging.checkpoint_every == 0) and self.checkpoints is not None:
            self.save(self.checkpoints, steps_done)

    def estimate(self, steps_done: int) -> None:
        """Reports the speed once, after `_MEASURED_UPDATES` updates that compiled nothing."""
        seconds = self.step_seconds[self.unmeasured :]
        if len(seconds) == 1 + _MEASURED_UPDATES:
            message = self.on_measured(float(np.mean(seconds[1:])), self.config.steps - steps_done)
            if message:
                self.progress.say(message)

    def seconds(self) -> float:
        """Wall clock of all parts of the run so far."""
        return self.seconds_before + time.perf_counter() - self.start

    def save(self, checkpoints: Checkpoints, steps_done: int) -> None:
        """Starts to save the run as it is after `steps_done` steps, unless that has been done."""
        checkpoints.wait()
        if checkpoints.saved != steps_done:
            checkpoints.save(self.snapshot(steps_done))

    def snapshot(self, steps_done: int) -> Snapshot:
        """The run as it is now, copied to the host. Waits for the device."""
        memory = replay_log.without_rows(self.state.replay)
        device = {
            "agent": dataclasses.replace(self.state, replay=memory),
            "acting": self.acting,
            "keys": {"act": self.act_key, "image": self.image_key},
            "metrics": self.metrics.sums,
        }
        header = {
            "fed": self.fed,
            "episode_return": self.episode_return,
            "episode_length": self.episode_length,
            "returns": list(self.returns),  # written while the loop goes on
            "metrics_count": self.metrics.count,
            "warmup_rng": self.warmup_rng.bit_generator.state,
            "seconds": self.seconds(),
        }
        host = {"step_seconds": np.asarray(self.step_seconds, np.float32)}
        try:
            host["environment"] = np.frombuffer(self.environment.get_state(), np.uint8)
        except (RuntimeError, ValueError, OSError) as error:  # after a failure; the episode will be cut off
            self.progress.say(f"the emulator's state cannot be saved ({error})")
        if self.pending is not None:
            host |= {f"pending_{name}": array for name, array in self.pending.row._asdict().items()}
        return Snapshot(steps_done, self.fed, arrays.to_host(device), header, host)

    def go_on(self, snapshot: Snapshot) -> Observation:
        """Puts everything but the agent back to what it was; returns the observation to act on next."""
        device, header, host = snapshot.device, snapshot.header, snapshot.host
        self.acting = arrays.from_host(self.acting, device, "acting/")
        keys = arrays.from_host({"act": self.act_key, "image": self.image_key}, device, "keys/")
        self.act_key, self.image_key = keys["act"], keys["image"]
        self.metrics.restore(device, "metrics/", header["metrics_count"])
        self.warmup_rng.bit_generator.state = header["warmup_rng"]
        self.fed, self.seconds_before = header["fed"], header["seconds"]
        self.episode_return, self.episode_length = header["episode_return"], header["episode_length"]
        self.returns = [(step, value) for step, value in header["returns"]]
        self.step_seconds = host["step_seconds"].tolist()
        self.unmeasured = len(self.step_seconds)
        if "pending_frames" in host:
            row = Row(*(host[f"pending_{name}"] for name in Row._fields))
            self.pending = _Pending(row, jax.device_put(row.frames, may_alias=False))
        try:
            if "environment" not in host:
                raise StateMismatch("it was not saved")
            with self.progress.part("the emulator, step by step") as on_step:
                return self.environment.set_state(host["environment"].tobytes(), on_step=on_step)
        except StateMismatch as error:
            self.progress.say(
                f"the emulator cannot be brought back to where it was ({error}); the running episode is cut off there "
                f"as truncated, and a new one begins"
            )
        # The next row says `first`, and the last one stored is no terminal: that is what a truncation looks like.
        self.episode_return, self.episode_length = 0.0, 0
        return self.environment.reset()


@jax.jit
def _sampler_metrics(state: Any) -> dict[str, jax.Array]:
    return agent.sampler_metrics(state)
