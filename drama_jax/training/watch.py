"""What the loop looks for in the agent's state: too many skipped updates and, for developers, broken invariants."""

from __future__ import annotations

from typing import Any

import chex
import jax
import numpy as np

from drama_jax import guard


class NotFiniteError(Exception):
    """Too many updates in a row were skipped because their loss or gradient was not finite."""


def check_skipped(in_a_row: float, limit: int) -> None:
    """Raises NotFiniteError if `in_a_row` skipped updates are as many as `limit` allows."""
    if in_a_row >= limit:
        raise NotFiniteError(
            f"loss or gradient were not finite in the last {int(in_a_row)} updates (max_skipped_updates is {limit})"
        )


def skipped_batch(state: Any, which: tuple[int, ...] = ()) -> dict[str, np.ndarray] | None:
    """The windows [B, T, ...] of the last world-model update that was skipped, from the replay of an `AgentState`.

    Args:
      state: of one agent, or of several, stacked.
      which: of several, the index of the one that is asked for: its replay is not copied as a whole.

    Returns:
      One array per field of `replay.Batch`, and `slots` [B], where in the ring the windows start; None if the world
      model's last update was not skipped: then it is the behaviour's, which learns from imagined steps.
    """
    if not state.guard.in_a_row[(*which, guard.WORLD_MODEL)]:
        return None
    slots = np.asarray(state.guard.slots[which])
    memory, length = state.replay, state.config.world_model.batch_length
    where = (*which, (slots[:, None] + np.arange(length)) % state.config.replay.capacity)
    fields = ("frames", "actions", "rewards", "terminals", "firsts")
    return {name: np.asarray(getattr(memory, name)[where]) for name in fields} | {"slots": slots}


def check_invariants(state: Any, fed: int) -> None:
    """Raises AssertionError if an `AgentState` that was given `fed` transitions is not as it must be; waits for it."""
    memory = state.replay
    chex.assert_tree_all_finite((state.world_model, state.behaviour, state.hyper))
    size, position = int(memory.size), int(memory.position)
    chex.assert_equal(size, min(fed, memory.capacity))
    chex.assert_equal(position, fed % memory.capacity)
    counters = jax.device_get(memory.counters)
    for name, counter in (("trained", counters.trained), ("imagined", counters.imagined)):
        assert (counter >= 0).all(), f"negative counter of {name} draws"
        assert (counter[size:] == 0).all(), f"{name} draws counted for steps that are not stored"
