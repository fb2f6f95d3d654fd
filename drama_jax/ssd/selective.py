"""The selective scan of Mamba-1 (Gu & Dao 2023, arXiv 2312.00752, section 3), with per-step resets.

Every channel has its own decays, so that no matrix product replaces the recurrence. Per channel, with a state s [N]:

    s_t = exp(dt_t A) s_(t-1) + dt_t x_t B_t
    y_t = s_t . C_t + D x_t

In shapes, B batch, T time, E channels, N state dim, Q chunk length.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from drama_jax import checks
from drama_jax.config import ConfigError
from drama_jax.precision import at_least_float32
from drama_jax.ssd.recurrence import compose
from drama_jax.ssd.segments import segment_index

SELECTIVE_IMPLEMENTATIONS = ("reference", "chunked")


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 32,
    implementation: Literal["reference", "chunked"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over a sequence.

    State, decays and sums are held in float32 for bfloat16 and float32 inputs and in float64 for float64 inputs. The
    chunked form and its gradient hold the states of one chunk, `[B, Q, E, N]`, and those between chunks.

    Args:
      x: `[B, T, E]` float, the input; any T >= 1.
      dt: `[B, T, E]` float, positive step sizes (after bias and softplus).
      A: `[E, N]` float, negative decay rates.
      B: `[B, T, N]`, x's dtype, input projection.
      C: `[B, T, N]`, x's dtype, output projection.
      D: optional `[E]` float, skip connection.
      initial_state: optional `[B, E, N]` float, the state before the first step; zeros if absent.
      segment_ids: optional `[B, T]` int, as in `ssd`.
      chunk_size: steps that the chunked form takes at once; no effect on the result but rounding.
      implementation: "reference" (token by token), "chunked" (an associative scan inside chunks), or None for the
        latter.

    Returns:
      y `[B, T, E]` in x's dtype, and the state after the last step, `[B, E, N]` in float32 or float64.

    Raises:
      TypeError, ValueError: on arguments that are no arrays, or shapes or dtypes that do not fit.
      ConfigError: on an unknown implementation.
    """
    if implementation is not None and implementation not in SELECTIVE_IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, SELECTIVE_IMPLEMENTATIONS))
        raise ConfigError(f"selective_scan: unknown implementation {implementation!r}; accepted: None, {accepted}")
    checks.arrays("selective_scan", x=(x, ("B", "T", "E"), "float"))
    checks.arrays(
        "selective_scan",
        dict(zip("BTE", x.shape)),
        dt=(dt, ("B", "T", "E"), "float"),
        A=(A, ("E", "N"), "float"),
        B=(B, ("B", "T", "N"), str(x.dtype)),
        C=(C, ("B", "T", "N"), str(x.dtype)),
        D=(D, ("E",), "float or None"),
        initial_state=(initial_state, ("B", "E", "N"), "float or None"),
        segment_ids=(segment_ids, ("B", "T"), "integer or None"),
    )
    checks.integers("selective_scan", T=x.shape[1], chunk_size=chunk_size)
    batch, time, channels = x.shape
    wide = at_least_float32(x.dtype)
    state = jnp.zeros((batch, channels, A.shape[1]), wide) if initial_state is None else initial_state.astype(wide)
    changed = jnp.zeros((batch, time), bool)
    if segment_ids is not None:
        changed = jnp.diff(segment_index(segment_ids), axis=1, prepend=0) > 0
    size = 1 if implementation == "reference" else min(chunk_size, time)
    return _scan(x, dt, A, B, C, D, state, changed, size)


def selective_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the selective scan.

    Args:
      state: `[B, E, N]` float; it keeps its dtype, the arithmetic runs in at least float32.
      x: `[B, E]` float.
      dt: `[B, E]` float, positive.
      A: `[E, N]` float, negative.
      B: `[B, N]`, x's dtype.
      C: `[B, N]`, x's dtype.
      D: optional `[E]` float.

    Returns:
      y `[B, E]` in x's dtype and the new state `[B, E, N]` in the state's dtype.

    Raises:
      TypeError, ValueError: on arguments that are no arrays, shapes or dtypes that do not fit.
    """
    checks.arrays("selective_step", x=(x, ("B", "E"), "float"))
    checks.arrays(
        "selective_step",
        dict(zip("BE", x.shape)),
        state=(state, ("B", "E", "N"), "float"),
        dt=(dt, ("B", "E"), "float"),
        A=(A, ("E", "N"), "float"),
        B=(B, ("B", "N"), str(x.dtype)),
        C=(C, ("B", "N"), str(x.dtype)),
        D=(D, ("E",), "float or None"),
    )
    wide = at_least_float32(x.dtype)
    decay, added = _terms(x, dt, A, B)
    new = decay * state.astype(wide) + added
    return _read(new, x, C, D), new.astype(state.dtype)


def _terms(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decay and input [.., E, N] of the state, from x and dt [.., E] and B [.., N]."""
    wide = at_least_float32(x.dtype)
    dt = dt.astype(wide)
    return jnp.exp(dt[..., None] * A.astype(wide)), (dt * x.astype(wide))[..., None] * B.astype(wide)[..., None, :]


def _read(state: jax.Array, x: jax.Array, C: jax.Array, D: jax.Array | None) -> jax.Array:
    """Output [.., E] from the state [.., E, N]."""
    y = jnp.sum(state * C.astype(state.dtype)[..., None, :], axis=-1)
    if D is not None:
        y = y + D.astype(state.dtype) * x.astype(state.dtype)
    return y.astype(x.dtype)


def _scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    state: jax.Array,
    changed: jax.Array,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence, `size` steps at once; the gradient keeps the states between chunks alone."""

    @jax.checkpoint
    def chunk(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, B, C, changed = now  # [B, Q, ..]
        decay, added = _terms(x, dt, A, B)
        # What decays is a number, not its logarithm: a reset is a decay of exactly 0.
        decay = jnp.where(changed[..., None, None], 0, decay)
        if size > 1:
            decay, added = jax.lax.associative_scan(compose, (decay, added), axis=1)
        states = decay * state[:, None] + added
        return states[:, -1], _read(states, x, C, D)

    batch, time = x.shape[:2]
    missing = -time % size

    def chunks(value: jax.Array) -> jax.Array:
        # A padded step has dt = 0: it neither decays the state nor adds to it.
        value = jnp.pad(value, ((0, 0), (0, missing)) + ((0, 0),) * (value.ndim - 2))
        return jnp.moveaxis(value.reshape(batch, -1, size, *value.shape[2:]), 1, 0)

    final, y = jax.lax.scan(chunk, state, tuple(map(chunks, (x, dt, B, C, changed))))
    return jnp.moveaxis(y, 0, 1).reshape(batch, time + missing, -1)[:, :time], final
