"""The agents of a run: they are given transitions, learn from them, and choose actions.

Shapes: N agents, each with one environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from drama_jax import exploration
from drama_jax.action_space import ActionSpace
from drama_jax.config import AgentConfig
from drama_jax.training import watch
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.loop_state import LoopState
from drama_jax.training.programs import Programs
from drama_jax.training.together import Together


class Agents:
    """What crosses to the device and back.

    Args:
      config: Of every agent.
      num_actions: A of the game, or `Continuous(A)`.
      state: `AgentState` of all agents, stacked; donated.
      now: Of the loop.
      together: How the agents lie on the devices.
      programs: The compiled functions.
      checkpoints: One per agent, given every row; None for an agent that has none.
      check: Check the agents' invariants after every transition, slowly (AssertionError).
    """

    def __init__(
        self,
        config: AgentConfig,
        num_actions: ActionSpace,
        state: Any,
        now: LoopState,
        together: Together,
        programs: Programs,
        checkpoints: Sequence[Checkpoints | None],
        check: bool,
    ) -> None:
        self._config, self._num_actions, self._now = config, num_actions, now
        self._together, self._programs, self._checkpoints, self._check = together, programs, checkpoints, check
        repeats, warmup = config.warmup_repeats, config.warmup_steps
        self._none_first = together.put(np.zeros(together.count, bool))  # sent once: most steps begin no episode
        self._durations = exploration.duration_table(repeats, warmup) if repeats and warmup else None
        self.state = state
        """`AgentState` of all agents after the last transition."""

    def choose(self, step: int, frames: jax.Array, firsts: np.ndarray, act_keys: jax.Array) -> np.ndarray | jax.Array:
        """The actions of a step; does not wait for the device.

        Args:
          step: Agent steps done.
          frames: [N, H, W, C] uint8 or [N, O] float32, on the devices.
          firsts: [N] bool.
          act_keys: [N] keys, or the one of one agent; the step's are derived from them.

        Returns:
          [N] int32, or [N, A] float32: random during warm-up, then drawn from the policies.
        """
        if step < self._config.warmup_steps:
            return self._random()
        player = self._programs.player(self.state)
        first = self._together.put(firsts) if firsts.any() else self._none_first
        actions, self._now.acting = self._programs.act(player, self._now.acting, frames, act_keys, step, first)
        actions.copy_to_host_async()  # on its way before the update is queued
        return actions

    def _random(self) -> np.ndarray:
        return np.concatenate([seat.random_action(self._num_actions, self._durations) for seat in self._now.seats])

    def feed(self) -> None:
        """Gives the agents the pending transitions: only stored during warm-up, with an update afterwards.

        Does not wait for the device.
        """
        pending = self._now.pending
        if pending is None:
            return
        for index, checkpoints in enumerate(self._checkpoints):
            if checkpoints is not None:
                checkpoints.add(pending.row(index))
        self._now.pending = None
        if self._now.fed < self._config.warmup_steps:
            self.state = self._programs.observe(self.state, *pending.arrays())
        else:
            self.state, metrics = self._programs.update(self.state, *pending.arrays())
            self._now.metrics.add(metrics)
        self._now.fed += 1
        if self._check:
            for index in range(self._together.count):
                watch.check_invariants(self._together.agent(self.state, index), self._now.fed)
