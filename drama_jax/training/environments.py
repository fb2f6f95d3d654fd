"""The environments of a run's agents, one each, which step together."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence

import numpy as np

from drama_jax.action_space import ActionSpace
from drama_jax.envs.base import EmulatorError, Env, Observation, attempt


class Environments:
    """N environments of `num_envs` 1; several step in threads of their own. To be closed, which leaves them open.

    Args:
      each: One per agent.
    """

    def __init__(self, each: Sequence[Env]) -> None:
        self.each = list(each)
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        if len(self.each) > 1:
            self._threads = concurrent.futures.ThreadPoolExecutor(len(self.each), "environment")
        self._failed = False

    @property
    def num_actions(self) -> ActionSpace:
        """Of each."""
        return self.each[0].num_actions

    @property
    def known(self) -> list[Env | None]:
        """The environments; None for each once one has failed, which may have left any of them within a step."""
        return [None if self._failed else environment for environment in self.each]

    def reset(self) -> list[Observation]:
        """The first observations, with the axis E = 1. Raises an EmulatorError if an environment fails."""
        return [attempt(environment.reset) for environment in self.each]

    def step(self, actions: np.ndarray) -> list[tuple[Observation, Observation]]:
        """Plays one action of each agent.

        Args:
          actions: [N] int32, or [N, A] float32.

        Returns:
          For each what came of it, and what to act on next; two observations where an episode has ended.

        Raises:
          EmulatorError: an environment failed; each may have played the step then, or some of it, or nothing.
        """
        own = [actions[index : index + 1] for index in range(len(self.each))]
        try:
            if self._threads is None:
                return [_step(environment, action) for environment, action in zip(self.each, own)]
            return list(self._threads.map(_step, self.each, own))
        except EmulatorError:
            self._failed = True
            raise

    def close(self) -> None:
        """Ends the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _step(environment: Env, action: np.ndarray) -> tuple[Observation, Observation]:
    after = attempt(environment.step, action)
    # A second call resets, whatever the action: it is no agent step and its row is not stored.
    return after, attempt(environment.step, action) if after.last[0] else after
