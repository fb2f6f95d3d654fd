"""The host loop: one environment, one update of the agent per agent step.

    step t:    act on frame t  ->  start the update with transition t-1  ->  emulator plays step t
                  (waits)            (asynchronous)                           (while the device updates)

Python waits for the device only at the action. What crosses to the device per step is one frame, an action and three
scalars. In this file E = 1 environment; arrays from the environment keep that axis.
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
from drama_jax.envs.base import Env, Observation
from drama_jax.training.checkpoint import Checkpoints
from drama_jax.training.logging import MeanMetrics, Progress, Writer, comparison_strip

_SEQUENCES_SHOWN = 3
_MEASURED_UPDATES = 3


@dataclasses.dataclass
class Training:
    """What came of a training run."""

    state: Any
    """AgentState after the last update."""
    returns: list[tuple[int, float]]
    """(agent step at the end, undiscounted raw return) of each episode, whole games with the terminal reward."""
    wall_clock_s: float
    ms_per_step: float | None
    """Median time of a step with an update; None if there was no update."""


@dataclasses.dataclass
class _Pending:
    """A transition that the agent has not been given yet, with the environment axis E = 1."""

    frames: jax.Array  # [1, H, W, C] uint8, already on the device
    actions: np.ndarray  # [1] int32
    rewards: np.ndarray  # [1] float32
    terminals: np.ndarray  # [1] bool
    firsts: np.ndarray  # [1] bool

    def arrays(self) -> tuple[Any, ...]:
        return self.frames, self.actions, self.rewards, self.terminals, self.firsts


def _transition(*arrays: jax.Array) -> replay.Transition:
    return replay.Transition(*(array[0] for array in arrays))


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
    on_measured: Callable[[float, int], str | None] = lambda seconds, steps_left: None,
) -> Training:
    """Trains for `config.steps` agent steps.

    Uniformly random actions for the first `warmup_steps`, then the policy's, with one update per step.

    Args:
      config: The run's configuration.
      environment: One environment (`num_envs` 1).
      state: Fresh `AgentState`; donated, do not use it afterwards.
      key: PRNG key, consumed.
      writer: Where scalars and images go.
      progress: The progress bar.
      checkpoints: Where checkpoints go, one every `logging.checkpoint_every` steps and one at the end.
      on_measured: Called once with (seconds per step, steps left) after the first measured updates; what it returns is
        shown to the user.
    """
    return _Loop(config, environment, state, key, writer, progress, checkpoints, on_measured).run()


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
        on_measured: Callable[[float, int], str | None],
    ) -> None:
        self.config, self.environment, self.state = config, environment, state
        self.writer, self.progress, self.checkpoints, self.on_measured = writer, progress, checkpoints, on_measured
        self.act_key, self.image_key, warmup_key = jax.random.split(key, 3)
        self.warmup_rng = np.random.default_rng(np.asarray(jax.random.bits(warmup_key, (4,))))
        self.acting = agent.initial_acting(state, 1)
        self.metrics = MeanMetrics()
        self.fed = 0  # transitions the agent has been given
        self.pending: _Pending | None = None
        self.episode_return, self.episode_length = 0.0, 0
        self.returns: list[tuple[int, float]] = []
        self.step_seconds: list[float] = []
        self.interval_start = 0.0, 0  # (time, step) at which the metrics interval began

    def run(self) -> Training:
        start = time.perf_counter()
        self.interval_start = start, 0
        observation = self.environment.reset()
        for step in range(self.config.steps):
            before = time.perf_counter()
            observation = self.step(step, observation)
            if step + 1 == self.config.steps:
                self.feed()
            self.record(step + 1)
            if step > self.config.agent.warmup_steps:
                self.step_seconds.append(time.perf_counter() - before)
                self.estimate(step + 1)
            self.progress.advance()
        jax.block_until_ready(self.state)
        median = 1e3 * float(np.median(self.step_seconds)) if self.step_seconds else None
        return Training(self.state, self.returns, time.perf_counter() - start, median)

    def step(self, step: int, observation: Observation) -> Observation:
        """One agent step from `observation`; returns the observation to act on next."""
        # A copy, because on CPU the device array might otherwise share the environment's memory.
        frames = jax.device_put(observation.frames, may_alias=False)
        actions = self.choose(step, frames, observation.first)
        # The device works through this update while the emulator plays.
        self.feed()
        after = self.environment.step(actions)
        self.pending = _Pending(frames, actions, after.rewards, after.terminals, observation.first)
        self.episode_return += float(after.rewards[0])
        self.episode_length += 1
        if not after.last[0]:
            return after
        self.end_episode(step + 1)
        # This call resets, whatever the action: it is no agent step and its row is not stored.
        return self.environment.step(actions)

    def choose(self, step: int, frames: jax.Array, first: np.ndarray) -> np.ndarray:
        """[1] int32: random during warm-up, then from the policy. Waits for the device."""
        if step < self.config.agent.warmup_steps:
            return self.warmup_rng.integers(self.environment.num_actions, size=1, dtype=np.int32)
        actions, self.acting = _act(self.state, self.acting, frames, self.act_key, step, first)
        return np.asarray(actions)

    def feed(self) -> None:
        """Gives the agent the pending transition: only stored during warm-up, with an update afterwards."""
        if self.pending is None:
            return
        arrays = self.pending.arrays()
        self.pending = None
        if self.fed < self.config.agent.warmup_steps:
            self.state = observe(self.state, *arrays)
        else:
            self.state, metrics = update(self.state, *arrays)
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
            self.images(steps_done)
        if (end or steps_done % logging.checkpoint_every == 0) and self.checkpoints is not None:
            self.checkpoints.save(steps_done, self.state)

    def images(self, steps_done: int) -> None:
        """A strip of reconstructions and one of an imagined rollout, from random windows of the replay."""
        truth, reconstruction, video = jax.device_get(
            _pictures(self.state, jax.random.fold_in(self.image_key, steps_done))
        )
        seen = truth[:, : reconstruction.shape[1]]
        self.writer.image(steps_done, "world_model/reconstruction", comparison_strip(seen, reconstruction))
        self.writer.image(steps_done, "world_model/imagined_rollout", comparison_strip(truth, video))

    def estimate(self, steps_done: int) -> None:
        """Reports the speed once, after `_MEASURED_UPDATES` updates that compiled nothing."""
        if len(self.step_seconds) == 1 + _MEASURED_UPDATES:
            message = self.on_measured(float(np.mean(self.step_seconds[1:])), self.config.steps - steps_done)
            if message:
                self.progress.say(message)


@jax.jit
def _sampler_metrics(state: Any) -> dict[str, jax.Array]:
    return agent.sampler_metrics(state)


@jax.jit
def _pictures(state: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(frames uint8 [B, context + horizon, H, W, C], reconstructions of the context, open-loop rollout)."""
    start_key, reconstruction_key, video_key = jax.random.split(key, 3)
    imagination = state.config.imagination
    context = imagination.context_length
    length = context + imagination.horizon
    starts = jax.random.randint(start_key, (_SEQUENCES_SHOWN,), 0, replay.num_starts(state.replay, length))
    batch = replay.gather(state.replay, starts, length)
    reconstruction = agent.reconstruct(state, batch.frames[:, :context], reconstruction_key)
    return batch.frames, reconstruction, agent.imagine_video(state, batch, video_key, context)
