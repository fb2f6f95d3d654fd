"""Guard rails: an update whose loss or gradient is not finite leaves no trace but a count.

The skipped update is not repaired or clipped; parameters, optimiser and statistics stay as they were. The counts are
metrics, and a run that skips too many in a row is stopped by its loop, with the batch to look at.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


@flax.struct.dataclass
class Guard:
    """What was skipped; entry 0 counts updates of the world model, entry 1 those of the behaviour."""

    skipped: jax.Array  # [2] int32, updates skipped since the start
    in_a_row: jax.Array  # [2] int32, of these the uninterrupted last ones
    slots: (
        jax.Array
    )  # [B] int32, where in the replay's ring the windows of the last skipped model batch start; -1: none


WORLD_MODEL, BEHAVIOUR = 0, 1


def init(batch_size: int) -> Guard:
    """Nothing skipped yet; B is the world model's batch size."""
    zeros = jnp.zeros((2,), jnp.int32)
    return Guard(skipped=zeros, in_a_row=zeros, slots=jnp.full((batch_size,), -1, jnp.int32))


def finite(*values: jax.Array) -> jax.Array:
    """[] bool: whether all scalars are finite. A gradient's norm is finite only if every entry is."""
    return jnp.isfinite(jnp.stack([value.astype(jnp.float32) for value in values])).all()


def keep(taken: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` if `taken` ([] bool), else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)


def count(guard: Guard, which: int, taken: jax.Array, slots: jax.Array | None = None) -> Guard:
    """Counts an update of `which` that was `taken` or not; `slots` [B] says where its batch came from."""
    skipped = 1 - taken.astype(jnp.int32)
    in_a_row = jnp.where(taken, 0, guard.in_a_row[which] + 1)
    return dataclasses.replace(
        guard,
        skipped=guard.skipped.at[which].add(skipped),
        in_a_row=guard.in_a_row.at[which].set(in_a_row),
        slots=guard.slots if slots is None else jnp.where(taken, guard.slots, slots),
    )


def metrics(guard: Guard) -> dict[str, jax.Array]:
    """Counts by TensorBoard tag, float32 scalars."""
    return {
        "guard/skipped_world_model_updates": guard.skipped[WORLD_MODEL].astype(jnp.float32),
        "guard/skipped_behaviour_updates": guard.skipped[BEHAVIOUR].astype(jnp.float32),
        "guard/skipped_in_a_row": guard.in_a_row.max().astype(jnp.float32),
    }
