"""The SSD recurrence as it is written: one token after the other. The oracle of the other implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from drama_jax.precision import at_least_float32
from drama_jax.ssd.segments import segment_index


def ssd_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step; arguments as in `drama_jax.ssd.ssd_step`, unchecked."""
    batch, heads, head_dim, state_dim = state.shape
    groups = B.shape[1]
    wide = at_least_float32(x.dtype)
    grouped = state.astype(wide).reshape(batch, groups, heads // groups, head_dim, state_dim)
    x_wide, dt_wide = x.astype(wide), dt.astype(wide)
    decay = jnp.exp(dt_wide * A.astype(wide)).reshape(batch, groups, -1, 1, 1)
    inputs = (dt_wide[..., None] * x_wide).reshape(batch, groups, -1, head_dim, 1)
    new = decay * grouped + inputs * B.astype(wide)[:, :, None, None, :]
    # A product and a sum, not a dot: XLA then reads and writes the state once, in one kernel.
    y = jnp.sum(new * C.astype(wide)[:, :, None, None, :], axis=-1).reshape(x.shape)
    if D is not None:
        y = y + D.astype(wide)[:, None] * x_wide
    return y.astype(x.dtype), new.reshape(state.shape).astype(state.dtype)


def ssd_reference(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence by `jax.lax.scan`; arguments as in `drama_jax.ssd.ssd`, unchecked."""
    batch, time, heads, head_dim = x.shape
    wide = at_least_float32(x.dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, B.shape[-1]), wide)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, time), jnp.int32)
    changed = jnp.diff(segment_index(segment_ids), axis=1, prepend=0) > 0

    def step(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_t, dt_t, B_t, C_t, changed_t = now
        state = jnp.where(changed_t[:, None, None, None], 0, state)
        y_t, state = ssd_step(state, x_t, dt_t, A, B_t, C_t, D=D)
        return state, y_t

    over_time = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, B, C, changed))
    final, y = jax.lax.scan(step, initial_state.astype(wide), over_time)
    return jnp.moveaxis(y, 0, 1), final
