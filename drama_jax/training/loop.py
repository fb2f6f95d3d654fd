"""The host loop: one environment per agent, one update per agent step.

    step t:    start act on frame t  ->  start the update with transition t-1  ->  fetch the action  ->  emulator plays

Python waits for the device only at the action. What crosses to the device per step and agent is one frame, an action
and three scalars. N agents step together, each as if it were alone; see `together` for how their states are stacked.
Each has E = 1 environment; arrays from an environment keep that axis.

Between two steps the whole run is the agents' state and a `LoopState`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax import agent
from drama_jax.action_space import Continuous
from drama_jax.config import AnyRunConfig
from drama_jax.envs.base import EmulatorError, Env, Observation, attempt
from drama_jax.training import watch
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.loop_state import LoopState, Pending
from drama_jax.training.programs import Programs
from drama_jax.training.recording import Recorder
from drama_jax.training.replay_log import Row
from drama_jax.training.together import Together


@dataclasses.dataclass
class Member:
    """One agent of a run: what it does not share with the others."""

    environment: Env
    """One environment (`num_envs` 1), freshly made."""
    key: jax.Array
    """PRNG key, consumed."""
    writer: Writer
    """Where scalars and images go."""
    checkpoints: Checkpoints | None = None
    """Where checkpoints go, one every `logging.checkpoint_every` steps, one at the end, and one where the training is
    ended early."""
    snapshot: Snapshot | None = None
    """Where to go on from; None to start at step 0. Those of all members are of the same step."""


@dataclasses.dataclass
class Training:
    """What came of one agent's training."""

    state: Any
    """AgentState after the last update; of several agents, without the replay."""
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


def train(
    config: AnyRunConfig,
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
    """Trains one agent; see `Member` and `train_together` for the arguments."""
    member = Member(environment, key, writer, checkpoints, snapshot)
    (training,) = train_together(
        config,
        [member],
        state,
        Together(1),
        progress=progress,
        stop=stop,
        on_measured=on_measured,
        check=check,
    )
    return training


def train_together(
    config: AnyRunConfig,
    members: Sequence[Member],
    state: Any,
    together: Together,
    *,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    on_measured: Callable[[float, int], str | None] = lambda seconds, steps_left: None,
    check: bool = False,
) -> list[Training]:
    """Trains until `config.steps` agent steps are done.

    Uniformly random actions for the first `warmup_steps`, then the policy's, with one update per step.

    Args:
      config: The run's configuration, the same for all members (but for the seed, which is not looked at).
      members: One per agent.
      state: `AgentState`, fresh or that of the snapshots, of all members (`together.stack`); donated, do not use it
        afterwards.
      together: How the agents lie on the devices.
      progress: The progress bar.
      stop: Asked after every step; True saves and ends the training.
      on_measured: Called once with (seconds per step, steps left) after the first measured updates; what it returns is
        shown to the user.
      check: Check the agents' invariants after every step, slowly (AssertionError).

    Returns:
      What came of it, one per member.
    """
    with contextlib.ExitStack() as stack:
        loop = _Loop(config, members, state, together, progress, stop, on_measured, check, stack)
        return loop.run()


class _Loop:
    """The state of `train_together`, so that its steps can be read one by one."""

    def __init__(
        self,
        config: AnyRunConfig,
        members: Sequence[Member],
        state: Any,
        together: Together,
        progress: Progress,
        stop: Callable[[], bool],
        on_measured: Callable[[float, int], str | None],
        check: bool,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.members, self.state, self.together = config, members, state, together
        self.progress, self.stop, self.check = progress, stop, check
        self.programs = Programs(together)
        writers = [member.writer for member in members]
        self.recorder = Recorder(config, writers, together, self.programs, progress, on_measured)
        acting = together.stack([agent.initial_acting(state, 1)] * together.count)
        self.now = LoopState.fresh(together, [member.key for member in members], acting)
        self.threads = None
        if together.count > 1:
            self.threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(together.count, "environment"))
        self.environments_known = True

    def run(self) -> list[Training]:
        first = done = 0 if self.members[0].snapshot is None else self.members[0].snapshot.step
        acting = self.now.acting
        stopped = fault = None
        try:
            observations = self.begin()
            self.recorder.begin(done, self.now)
            act_keys = self.together.stack([seat.act_key for seat in self.now.seats])
            for step in range(done, self.config.steps):
                before = time.perf_counter()
                acting = self.now.acting
                observations = self.step(step, observations, act_keys)
                done = step + 1
                if done == self.config.steps:
                    self.feed()
                self.recorder.step(done, self.state, self.now)
                if done == self.config.steps or done % self.config.logging.checkpoint_every == 0:
                    self.save(done)
                if step > self.config.agent.warmup_steps:
                    self.now.step_seconds.append(time.perf_counter() - before)
                    self.recorder.estimate(done, self.now.step_seconds)
                self.progress.advance()
                if self.stop():
                    stopped = done
                    break
        except EmulatorError as error:
            fault = f"the emulator failed in step {done}: {error}"
            self.now.acting = acting  # the step will be taken again
            # Of several environments, some have played the step and some have not.
            self.environments_known = self.together.count == 1
        except watch.NotFiniteError as error:
            fault = f"{error}{self.recorder.skipped_batches(done, self.state)}"
        if done > first and (stopped is not None or fault is not None):
            self.save(done)
        for member in self.members:
            if member.checkpoints is not None:
                member.checkpoints.wait()
        jax.block_until_ready(self.state)
        return self.results(stopped, fault)

    def results(self, stopped: int | None, fault: str | None) -> list[Training]:
        """What came of the run, one per member."""
        clock = self.now.clock
        part = clock.part
        median = 1e3 * float(np.median(self.now.step_seconds)) if self.now.step_seconds else None
        states = [self.state]
        if self.together.count > 1:
            # A copy of every replay would need as much memory again.
            small = dataclasses.replace(self.state, replay=None)
            states = [self.together.agent(small, index) for index in range(self.together.count)]
        return [
            Training(
                state=state,
                returns=seat.returns,
                wall_clock_s=clock.before + part,
                this_part_s=part,
                ms_per_step=median,
                stopped=stopped,
                fault=fault,
            )
            for state, seat in zip(states, self.now.seats)
        ]

    def begin(self) -> list[Observation]:
        """The first observations: of fresh environments, or where the snapshots were taken."""
        snapshots = [member.snapshot for member in self.members if member.snapshot is not None]
        if not snapshots:
            return [attempt(member.environment.reset) for member in self.members]
        environments = [member.environment for member in self.members]
        with self.progress.part("the emulator, step by step") as on_step:
            observations = self.now.restore(snapshots, environments, on_step, self.progress.say)
        return observations

    def step(self, step: int, observations: list[Observation], act_keys: jax.Array) -> list[Observation]:
        """One agent step from `observations`; returns those to act on next."""
        shown = _concatenated([observation.frames for observation in observations])
        firsts = _concatenated([observation.first for observation in observations])
        # A copy, because on CPU the device array might otherwise share the environment's memory.
        frames = self.together.put(shown)
        chosen = self.choose(step, frames, firsts, act_keys)
        # Queued before the action is fetched, so that the device goes from one to the other without waiting for Python;
        # it works through this update while the emulator plays.
        self.feed()
        actions = np.asarray(chosen)  # waits for the action alone
        played = self.play([actions[index : index + 1] for index in range(len(self.members))])
        after = [first for first, _ in played]
        rewards, terminals = (_concatenated([getattr(one, name) for one in after]) for name in ("rewards", "terminals"))
        self.now.pending = Pending(Row(shown, actions, rewards, terminals, firsts), frames)
        for index, (seat, observation) in enumerate(zip(self.now.seats, after)):
            seat.episode_return += float(observation.rewards[0])
            seat.episode_length += 1
            if observation.last[0]:
                self.end_episode(index, step + 1)
        return [following for _, following in played]

    def play(self, actions: list[np.ndarray]) -> list[tuple[Observation, Observation]]:
        """Every environment's step [1] with its action: what came of it, and what to act on next."""
        environments = [member.environment for member in self.members]
        if self.threads is None:
            return [_play(environment, action) for environment, action in zip(environments, actions)]
        return list(self.threads.map(_play, environments, actions))

    def choose(self, step: int, frames: jax.Array, firsts: np.ndarray, act_keys: jax.Array) -> np.ndarray | jax.Array:
        """[N] int32, or [N, A] float32: random during warm-up, then from the policies. Does not wait for the device."""
        if step < self.config.agent.warmup_steps:
            size, seats = self.members[0].environment.num_actions, self.now.seats
            if isinstance(size, Continuous):
                drawn = [seat.warmup_rng.uniform(-1, 1, (1, size.size)) for seat in seats]
                return _concatenated(drawn).astype(np.float32)
            return _concatenated([seat.warmup_rng.integers(size, size=1, dtype=np.int32) for seat in seats])
        actions, self.now.acting = self.programs.act(self.state, self.now.acting, frames, act_keys, step, firsts)
        return actions

    def feed(self) -> None:
        """Gives the agents the pending transitions: only stored during warm-up, with an update afterwards."""
        if self.now.pending is None:
            return
        transitions = self.now.pending.arrays()
        for index, member in enumerate(self.members):
            if member.checkpoints is not None:
                member.checkpoints.add(self.now.pending.row(index))
        self.now.pending = None
        if self.now.fed < self.config.agent.warmup_steps:
            self.state = self.programs.observe(self.state, *transitions)
        else:
            self.state, metrics = self.programs.update(self.state, *transitions)
            self.now.metrics.add(metrics)
        self.now.fed += 1
        if self.check:
            for index in range(self.together.count):
                watch.check_invariants(self.together.agent(self.state, index), self.now.fed)

    def end_episode(self, index: int, steps_done: int) -> None:
        """Notes and logs an agent's episode that has just ended."""
        seat = self.now.seats[index]
        seat.returns.append((steps_done, seat.episode_return))
        self.recorder.episode(index, steps_done, seat, self.now.clock)
        seat.episode_return, seat.episode_length = 0.0, 0

    def save(self, steps_done: int) -> None:
        """Starts to save the run as it is after `steps_done` steps, where that is wanted and has not been done."""
        wanted = [member.checkpoints for member in self.members if member.checkpoints is not None]
        for checkpoints in wanted:
            checkpoints.wait()
        if all(checkpoints.saved == steps_done for checkpoints in wanted):
            return
        environments = [member.environment if self.environments_known else None for member in self.members]
        snapshots = self.now.snapshots(steps_done, self.state, environments, self.progress.say)
        for member, snapshot in zip(self.members, snapshots):
            if member.checkpoints is not None and member.checkpoints.saved != steps_done:
                member.checkpoints.save(snapshot)


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _play(environment: Env, action: np.ndarray) -> tuple[Observation, Observation]:
    after = attempt(environment.step, action)
    # A second call resets, whatever the action: it is no agent step and its row is not stored.
    return after, attempt(environment.step, action) if after.last[0] else after
