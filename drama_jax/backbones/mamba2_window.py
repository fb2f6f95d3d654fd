"""The memory of a Mamba-2 mixer over a short rollout: a window of past inputs instead of the SSM state.

By state-space duality (Dao & Gu 2024, section 5) the output of the recurrence is a masked attention over the past,

    y_t = sum over s <= t of (C_t . B_s) w_s x_s + D x_t,      w_s = dt_s exp(sum over s < r <= t of dt_r A).

A step of the recurrence reads and writes the state [H, P, N] in float32: 8 N bytes per channel of the inner width.
A step of the window reads x_s once per past step, 2 bytes per channel in bfloat16, and writes one x_t: the shorter
the window, the cheaper; up to 4 N steps in bfloat16 (2 N in float32) it moves less memory.

Shapes: B batch, S steps a window can hold (context and horizon), H heads, P head dim, I = H P, N state dim.
"""

from __future__ import annotations

import dataclasses

import flax
import jax
import jax.numpy as jnp

from drama_jax.precision import at_least_float32


@flax.struct.dataclass
class Mamba2LayerWindow:
    """What one mixer remembers during a rollout of bounded length."""

    conv: tuple[jax.Array, ...]  # W - 1 times [B, V] compute dtype: last inputs of the convolution, oldest first
    context: jax.Array  # [B, S - horizon, I] compute dtype: x of the steps before the rollout
    # x of the steps of the rollout, in compute dtype: [B, horizon, I], or one [B, I] each for an unrolled loop.
    rollout: jax.Array | tuple[jax.Array, ...]
    B: jax.Array  # [B, S, N] compute dtype
    weights: jax.Array  # [B, S, H] at least float32: w_s, zero where the past was dropped and where nothing is yet
    position: jax.Array  # [] int32: the index in S of the next step


@flax.struct.dataclass
class Mamba2Window:
    """What the backbone remembers during a rollout of bounded length."""

    layers: tuple[Mamba2LayerWindow, ...]  # one per layer


def open_window(
    conv: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    index: jax.Array | None,
    *,
    horizon: int,
    unrolled: bool,
) -> tuple[jax.Array, Mamba2LayerWindow]:
    """Output over a context of T steps that starts from nothing, and the window after it.

    Args:
      conv: `[B, W - 1, V]`, the last inputs of the convolution.
      x: `[B, T, H, P]`, B and C: `[B, T, 1, N]`, dt: `[B, T, H]` positive, A and D: `[H]`, A negative; of the context.
      index: optional `[B, T]` int32 from `segment_index`; the past of another segment is dropped.
      horizon: how many steps the window will be advanced, static.
      unrolled: one array per step to come, for a loop that the compiler sees unrolled: it then knows which exist.

    Returns:
      y `[B, T, H, P]` in x's dtype, and the window.
    """
    batch, time = x.shape[:2]
    wide = at_least_float32(x.dtype)
    weights = _context_weights(dt.astype(wide), A.astype(wide), index)
    # Products and sums throughout: matrix products this small gain nothing, and make XLA turn whole arrays around.
    scores = jnp.sum(C.astype(wide) * jnp.moveaxis(B, 1, 2).astype(wide), axis=-1)
    attention = scores[..., None] * weights
    y = D.astype(wide)[:, None] * x.astype(wide)
    for s in range(time):
        y = y + attention[:, :, s, :, None] * x[:, s, None].astype(wide)
    room = ((0, 0), (0, horizon), (0, 0))
    context = x.reshape(batch, time, -1)
    row = jnp.zeros_like(context[:, 0])
    return y.astype(x.dtype), Mamba2LayerWindow(
        conv=tuple(conv[:, tap] for tap in range(conv.shape[1])),
        context=context,
        rollout=(row,) * horizon if unrolled else jnp.broadcast_to(row[:, None], (batch, horizon, row.shape[-1])),
        B=jnp.pad(B[:, :, 0], room),
        weights=jnp.pad(weights[:, -1], room),
        position=jnp.asarray(time, jnp.int32),
    )


def _context_weights(dt: jax.Array, A: jax.Array, index: jax.Array | None) -> jax.Array:
    """w_s as seen from each step, [B, T, S = T, H]; zero for later steps and other segments."""
    decay = jnp.exp(dt * A)
    steps = jnp.arange(dt.shape[1], dtype=jnp.int32)[:, None]
    weights, seen = jnp.zeros_like(dt), []
    for t in range(dt.shape[1]):
        weights = jnp.where(steps == t, dt, weights * decay[:, t, None])
        if index is not None:
            weights = jnp.where((index == index[:, t, None])[..., None], weights, 0)
        seen.append(weights)
    return jnp.stack(seen, axis=1)


def attend(
    window: Mamba2LayerWindow, x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array
) -> tuple[jax.Array, Mamba2LayerWindow]:
    """One step of the recurrence, computed from the window.

    Args:
      window: its `conv` is left alone.
      x: `[B, H, P]`, dt: `[B, H]` positive, A and D: `[H]`, B and C: `[B, 1, N]`; of this step.

    Returns:
      y `[B, H, P]` in x's dtype and the window that includes this step. A step beyond the horizon gives NaN.
    """
    batch, heads, _ = x.shape
    wide = at_least_float32(x.dtype)
    here = (jnp.arange(window.B.shape[1], dtype=jnp.int32) == window.position)[:, None]
    dt = dt.astype(wide)
    decay = jnp.exp(dt * A.astype(wide))
    weights = jnp.where(here, dt[:, None], window.weights * decay[:, None])
    keys = jnp.where(here, B, window.B)
    # A product and a sum, as in `ssd_step`: one matrix-vector product per row is nothing for a matrix unit.
    scores = jnp.sum(keys.astype(wide) * C.astype(wide), axis=-1)
    attention = scores[..., None] * weights
    rollout = _write(window.rollout, x.reshape(batch, -1), window.position - window.context.shape[1])
    # Each step reads the context anew: without the barrier XLA casts it once for all unrolled steps, to twice the size.
    context = jax.lax.optimization_barrier(window.context)
    y = _weighted_sum(attention, context, rollout, window.position, heads)
    y = y + D.astype(wide)[:, None] * x.astype(wide)
    y = jnp.where(window.position < window.B.shape[1], y, jnp.nan)
    advanced = dataclasses.replace(
        window, context=context, rollout=rollout, B=keys, weights=weights, position=window.position + 1
    )
    return y.astype(x.dtype), advanced


def _write(
    rollout: jax.Array | tuple[jax.Array, ...], row: jax.Array, step: jax.Array
) -> jax.Array | tuple[jax.Array, ...]:
    if isinstance(rollout, tuple):
        # Unrolled, `step` is a constant to the compiler: all selections vanish, and no array is ever updated.
        return tuple(jnp.where(step == n, row, old) for n, old in enumerate(rollout))
    return jax.lax.dynamic_update_slice_in_dim(rollout, row[:, None], step, axis=1)


def _weighted_sum(
    attention: jax.Array,
    context: jax.Array,
    rollout: jax.Array | tuple[jax.Array, ...],
    position: jax.Array,
    heads: int,
) -> jax.Array:
    """sum over s of attention_s x_s, [B, H, P], from attention [B, S, H]."""
    # Written out as a sum over slices: an elementwise kernel that reads every x once and writes nothing between.
    batch, length, _ = context.shape
    steps = len(rollout) if isinstance(rollout, tuple) else rollout.shape[1]
    total = jnp.zeros((batch, heads, context.shape[-1] // heads), attention.dtype)
    for s in range(length + steps):
        if s < length:
            row = context[:, s]
        else:
            row = rollout[s - length] if isinstance(rollout, tuple) else rollout[:, s - length]
        term = attention[:, s, :, None] * row.reshape(total.shape).astype(attention.dtype)
        total = total + (term if s < length else jnp.where(s <= position, term, 0))
    return total
