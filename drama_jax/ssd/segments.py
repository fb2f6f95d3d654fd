"""Segment ids: where a recurrent state is dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_index(segment_ids: jax.Array) -> jax.Array:
    """Number of id changes up to and including each step, counted from an id 0 before the first step.

    Steps with equal index belong together whatever the labels: a label that comes back later is a new segment.

    Args:
      segment_ids: `[B, T]` int.

    Returns:
      `[B, T]` int32, non-decreasing along T; 0 = still connected to the initial state.
    """
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(segment_ids != before, axis=1, dtype=jnp.int32)
