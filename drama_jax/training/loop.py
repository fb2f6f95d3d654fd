"""The host loop: one environment, one update of the agent per agent step.

    step t:    start act on frame t  ->  start the update with transition t-1  ->  fetch the action  ->  emulator plays

Python waits for the device only at the action. What crosses to the device per step is one frame, an action and three
scalars. In this file E = 1 environment; arrays from the environment keep that axis.

Between two steps the whole run is the agent's state and a `LoopState`.
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
from drama_jax.envs.base import EmulatorError, Env, Observation, attempt
from drama_jax.training import images, watch
from drama_jax.training.checkpoint import Checkpoints, Snapshot
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.loop_state import LoopState, Pending
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
    """What ended the training early, other than `stop`: a failing emulator, updates that are not finite; else None."""


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
    check: bool = False,
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
      check: Check the agent's invariants after every step, slowly (AssertionError).
    """
    loop = _Loop(config, environment, state, key, writer, progress, checkpoints, stop, on_measured, check)
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
        check: bool,
    ) -> None:
        self.config, self.environment, self.state = config, environment, state
        self.writer, self.progress, self.checkpoints = writer, progress, checkpoints
        self.stop, self.on_measured, self.check = stop, on_measured, check
        self.now = LoopState.fresh(key, agent.initial_acting(state, 1))
        self.unmeasured = 0  # of the seconds per step, how many are of earlier parts of the run
        self.start = time.perf_counter()
        self.interval_start = self.start, 0  # (time, step) at which the metrics interval began

    def run(self, snapshot: Snapshot | None) -> Training:
        done = 0 if snapshot is None else snapshot.step
        self.interval_start = self.start, done
        first, acting = done, self.now.acting
        stopped = fault = None
        try:
            observation = attempt(self.environment.reset) if snapshot is None else self.go_on(snapshot)
            for step in range(done, self.config.steps):
                before = time.perf_counter()
                acting = self.now.acting
                observation = self.step(step, observation)
                done = step + 1
                if done == self.config.steps:
                    self.feed()
                self.record(done)
                if step > self.config.agent.warmup_steps:
                    self.now.step_seconds.append(time.perf_counter() - before)
                    self.estimate(done)
                self.progress.advance()
                if self.stop():
                    stopped = done
                    break
        except EmulatorError as error:
            fault = f"the emulator failed in step {done}: {error}"
            self.now.acting = acting  # the step will be taken again
        except watch.NotFiniteError as error:
            fault = f"{error}{self.keep_batch(done)}"
        if self.checkpoints is not None:
            if done > first and (stopped is not None or fault is not None):
                self.save(self.checkpoints, done)
            self.checkpoints.wait()
        jax.block_until_ready(self.state)
        median = 1e3 * float(np.median(self.now.step_seconds)) if self.now.step_seconds else None
        part = time.perf_counter() - self.start
        return Training(
            state=self.state,
            returns=self.now.returns,
            wall_clock_s=self.now.seconds_before + part,
            this_part_s=part,
            ms_per_step=median,
            stopped=stopped,
            fault=fault,
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
        after = attempt(self.environment.step, actions)
        # A second call resets, whatever the action: it is no agent step and its row is not stored.
        following = attempt(self.environment.step, actions) if after.last[0] else after
        row = Row(observation.frames, actions, after.rewards, after.terminals, observation.first)
        self.now.pending = Pending(row, frames)
        self.now.episode_return += float(after.rewards[0])
        self.now.episode_length += 1
        if after.last[0]:
            self.end_episode(step + 1)
        return following

    def choose(self, step: int, frames: jax.Array, first: np.ndarray) -> np.ndarray | jax.Array:
        """[1] int32: random during warm-up, then from the policy. Does not wait for the device."""
        if step < self.config.agent.warmup_steps:
            return self.now.warmup_rng.integers(self.environment.num_actions, size=1, dtype=np.int32)
        actions, self.now.acting = _act(self.state, self.now.acting, frames, self.now.act_key, step, first)
        return actions

    def feed(self) -> None:
        """Gives the agent the pending transition: only stored during warm-up, with an update afterwards."""
        if self.now.pending is None:
            return
        transition = self.now.pending.arrays()
        if self.checkpoints is not None:
            self.checkpoints.add(self.now.pending.row)
        self.now.pending = None
        if self.now.fed < self.config.agent.warmup_steps:
            self.state = observe(self.state, *transition)
        else:
            self.state, metrics = update(self.state, *transition)
            self.now.metrics.add(metrics)
        self.now.fed += 1
        if self.check:
            watch.check_invariants(self.state, self.now.fed)

    def end_episode(self, steps_done: int) -> None:
        """Logs the episode that has just ended."""
        self.now.returns.append((steps_done, self.now.episode_return))
        self.writer.scalars(
            steps_done,
            {
                "charts/episodic_return": self.now.episode_return,
                "charts/episodic_length": float(self.now.episode_length),
            },
        )
        self.progress.show(last_return=f"{self.now.episode_return:g}")
        self.now.episode_return, self.now.episode_length = 0.0, 0

    def record(self, steps_done: int) -> None:
        """Writes metrics, images and checkpoints where they are due: at intervals and at the end."""
        logging, end = self.config.logging, steps_done == self.config.steps
        if end or steps_done % logging.metrics_every == 0:
            values = self.now.metrics.fetch() | jax.device_get(_state_metrics(self.state))
            now = time.perf_counter()
            then, step_then = self.interval_start
            self.interval_start = now, steps_done
            self.writer.scalars(steps_done, {**values, "charts/SPS": (steps_done - step_then) / (now - then)})
            watch.check_skipped(values["guard/skipped_in_a_row"], self.config.max_skipped_updates)
        if (end or steps_done % logging.images_every == 0) and self.now.fed > self.config.agent.warmup_steps:
            images.log(self.writer, steps_done, self.state, jax.random.fold_in(self.now.image_key, steps_done))
        if (end or steps_done % logging.checkpoint_every == 0) and self.checkpoints is not None:
            self.save(self.checkpoints, steps_done)

    def keep_batch(self, steps_done: int) -> str:
        """Writes the batch of the last skipped world-model update; returns where it is, to be appended to a message."""
        batch = watch.skipped_batch(self.state)
        path = None if batch is None else self.writer.arrays(steps_done, "not-finite", batch)
        return "" if path is None else f"; their last batch is in {path}"

    def estimate(self, steps_done: int) -> None:
        """Reports the speed once, after `_MEASURED_UPDATES` updates that compiled nothing."""
        seconds = self.now.step_seconds[self.unmeasured :]
        if len(seconds) == 1 + _MEASURED_UPDATES:
            message = self.on_measured(float(np.mean(seconds[1:])), self.config.steps - steps_done)
            if message:
                self.progress.say(message)

    def seconds(self) -> float:
        """Wall clock of all parts of the run so far."""
        return self.now.seconds_before + time.perf_counter() - self.start

    def go_on(self, snapshot: Snapshot) -> Observation:
        """Puts all but the agent back to where it was; returns the observation to act on next."""
        with self.progress.part("the emulator, step by step") as on_step:
            observation = self.now.restore(snapshot, self.environment, on_step, self.progress.say)
        self.unmeasured = len(self.now.step_seconds)
        return observation

    def save(self, checkpoints: Checkpoints, steps_done: int) -> None:
        """Starts to save the run as it is after `steps_done` steps, unless that has been done."""
        checkpoints.wait()
        if checkpoints.saved != steps_done:
            checkpoints.save(
                self.now.snapshot(steps_done, self.state, self.environment, self.seconds(), self.progress.say)
            )


@jax.jit
def _state_metrics(state: Any) -> dict[str, jax.Array]:
    return agent.state_metrics(state)
