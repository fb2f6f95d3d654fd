"""The host loop: one environment per agent, one update per agent step.

    step t:    start act on frame t  ->  start the update with transition t-1  ->  fetch the action  ->  emulator plays

Python waits for the device only at the action. What crosses to the device per step and agent is one frame, an action
and three scalars. N agents step together, each as if it were alone; see `together` for how their states are stacked.
Each has E = 1 environment; arrays from an environment keep that axis.

Between two steps the whole run is the agents' state and a `LoopState`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax import agent
from drama_jax.config import AnyRunConfig
from drama_jax.envs.base import EmulatorError, Env, Observation
from drama_jax.training import watch
from drama_jax.training.agents import Agents
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.environments import Environments
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.loop_state import LoopState, Pending
from drama_jax.training.member import Member, Training
from drama_jax.training.programs import Programs
from drama_jax.training.recording import Recorder
from drama_jax.training.replay_log import Row
from drama_jax.training.together import Together


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

    Random actions for the first `warmup_steps`, then the policy's, with one update per step.

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
    with contextlib.closing(Environments([member.environment for member in members])) as environments:
        return _Loop(config, members, environments, state, together, progress, stop, on_measured, check).run()


class _Loop:
    """The state of `train_together`, so that its steps can be read one by one."""

    def __init__(
        self,
        config: AnyRunConfig,
        members: Sequence[Member],
        environments: Environments,
        state: Any,
        together: Together,
        progress: Progress,
        stop: Callable[[], bool],
        on_measured: Callable[[float, int], str | None],
        check: bool,
    ) -> None:
        self.config, self.environments, self.together = config, environments, together
        self.progress, self.stop = progress, stop
        self.snapshots = [member.snapshot for member in members if member.snapshot is not None]
        self.checkpoints = [member.checkpoints for member in members]
        acting = together.stack([agent.initial_acting(state, 1)] * together.count)
        self.now = LoopState.fresh(together, [member.key for member in members], acting)
        programs = Programs(together)
        self.agents = Agents(
            config.agent, environments.num_actions, state, self.now, together, programs, self.checkpoints, check
        )
        writers = [member.writer for member in members]
        self.recorder = Recorder(config, writers, together, programs, progress, on_measured)
        self.done = self.snapshots[0].step if self.snapshots else 0  # agent steps

    def run(self) -> list[Training]:
        """Trains; however that ends, what has been learnt is saved."""
        first, stopped, fault = self.done, False, None
        try:
            stopped = self.go_on()
        except EmulatorError as error:
            fault = f"the emulator failed in step {self.done}: {error}"
        except watch.NotFiniteError as error:
            fault = f"{error}{self.recorder.skipped_batches(self.done, self.agents.state)}"
        if self.done > first and (stopped or fault is not None):
            self.save()
        self.wait_for_checkpoints()
        self.recorder.close()
        jax.block_until_ready(self.agents.state)
        return self.results(self.done if stopped else None, fault)

    def go_on(self) -> bool:
        """Takes the steps that are left; whether `stop` has ended that.

        Raises:
          EmulatorError: an environment failed in the step after `done`.
          NotFiniteError: too many updates in a row were skipped.
        """
        observations = self.begin()
        act_keys = self.together.stack([seat.act_key for seat in self.now.seats])
        while self.done < self.config.steps:
            before = time.perf_counter()
            observations = self.step(self.done, observations, act_keys)
            self.done += 1
            self.after_step(before)
            if self.stop():
                return True
        return False

    def begin(self) -> list[Observation]:
        """The first observations: of fresh environments, or where the snapshots were taken."""
        if self.snapshots:
            with self.progress.part("the emulator, step by step") as on_step:
                observations = self.now.restore(self.snapshots, self.environments.each, on_step, self.progress.say)
        else:
            observations = self.environments.reset()
        self.recorder.begin(self.done, self.now)
        return observations

    def step(self, step: int, observations: list[Observation], act_keys: jax.Array) -> list[Observation]:
        """One agent step from `observations`; returns those to act on next.

        Raises:
          EmulatorError: an environment failed. The transition is lost; a run that goes on begins a new episode.
        """
        shown = _concatenated([observation.frames for observation in observations])
        firsts = _concatenated([observation.first for observation in observations])
        # A copy, because on CPU the device array might otherwise share the environment's memory.
        frames = self.together.put(shown)
        chosen = self.agents.choose(step, frames, firsts, act_keys)
        # Queued before the action is fetched, so that the device goes from one to the other without waiting for Python;
        # it works through this update while the emulator plays.
        self.agents.feed()
        actions = np.asarray(chosen)  # waits for the action alone
        played = self.environments.step(actions)
        after = [first for first, _ in played]
        rewards, terminals = (_concatenated([getattr(one, name) for one in after]) for name in ("rewards", "terminals"))
        self.now.pending = Pending(Row(shown, actions, rewards, terminals, firsts), frames)
        for index, observation in enumerate(after):
            self.count(index, observation, step + 1)
        return [following for _, following in played]

    def count(self, index: int, observation: Observation, steps_done: int) -> None:
        """Adds a step to an agent's episode; notes and logs the episode if it has ended."""
        seat = self.now.seats[index]
        seat.episode_return += float(observation.rewards[0])
        seat.episode_length += 1
        if observation.last[0]:
            seat.returns.append((steps_done, seat.episode_return))
            self.recorder.episode(index, steps_done, seat, self.now.clock)
            seat.episode_return, seat.episode_length = 0.0, 0

    def after_step(self, before: float) -> None:
        """Logs and saves what is due after a step that began at `before`, and notes how long it all took."""
        end = self.done == self.config.steps
        if end:
            self.agents.feed()
        self.recorder.step(self.done, self.agents.state, self.now)
        if end or self.done % self.config.logging.checkpoint_every == 0:
            self.save()
        if self.done > self.config.agent.warmup_steps + 1:
            self.now.step_seconds.append(time.perf_counter() - before)
            self.recorder.estimate(self.done, self.now.step_seconds)
        self.progress.advance()

    def save(self) -> None:
        """Starts to save the run as it is, where that is wanted and has not been done."""
        self.wait_for_checkpoints()
        if all(one is None or one.saved == self.done for one in self.checkpoints):
            return
        snapshots = self.now.snapshots(self.done, self.agents.state, self.environments.known, self.progress.say)
        for checkpoints, snapshot in zip(self.checkpoints, snapshots):
            if checkpoints is not None and checkpoints.saved != self.done:
                checkpoints.save(snapshot)

    def wait_for_checkpoints(self) -> None:
        """Returns when no checkpoint is being written."""
        for checkpoints in self.checkpoints:
            if checkpoints is not None:
                checkpoints.wait()

    def results(self, stopped: int | None, fault: str | None) -> list[Training]:
        """What came of the run, one per member."""
        clock = self.now.clock
        part = clock.part
        median = 1e3 * float(np.median(self.now.step_seconds)) if self.now.step_seconds else None
        states = [self.agents.state]
        if self.together.count > 1:
            # A copy of every replay would need as much memory again.
            small = dataclasses.replace(self.agents.state, replay=None)
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


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
