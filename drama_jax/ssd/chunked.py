"""The SSD scan as matrix products inside chunks and an associative scan over the chunks' states.

Dao & Gu 2024, section 6: with Q steps a chunk, the influence of step j on step i of the same chunk is a masked
attention matrix C_i.B_j exp(sum of dt A over (j, i]) dt_j; everything older reaches the chunk through one state.

Shapes: b batch, c chunks, q (or i, j) steps of a chunk, g groups, r heads of a group, h = g * r heads, p head dim,
n state dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from drama_jax.precision import at_least_float32
from drama_jax.ssd.segments import segment_index


def ssd_chunked(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence; arguments as in `drama_jax.ssd.ssd`, unchecked."""
    batch, time, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    wide = at_least_float32(x.dtype)
    size = min(chunk_size, time)
    index = None if segment_ids is None else _chunks(segment_index(segment_ids), size, mode="edge")

    # A padded step has dt = 0: it neither decays the state nor adds to it.
    xs = _chunks(x, size).reshape(batch, -1, size, groups, heads // groups, head_dim)
    Bs, Cs = _chunks(B, size), _chunks(C, size)
    dts = jnp.moveaxis(_chunks(dt.astype(wide), size), 2, 3)  # [b, c, h, q]
    high, low = _cumulative_sum(dts * A.astype(wide)[:, None])

    y = _within_chunks(xs, dts, Bs, Cs, high, low, index)
    chunk_states = _chunk_states(xs, dts, Bs, high, low, index)
    from_zero = initial_state is None
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state_dim), wide)
    first = initial_state.astype(wide).reshape(batch, groups, -1, head_dim, state_dim)
    entry, final = _pass_states(chunk_states, high[..., -1] + low[..., -1], first, index)
    if not (from_zero and time <= size):
        y = y + _from_entry_states(Cs, entry, high + low, index, x.dtype)

    y = y.reshape(batch, -1, heads, head_dim)[:, :time]
    if D is not None:
        y = y + D.astype(wide)[:, None] * x.astype(wide)
    return y.astype(x.dtype), final.reshape(batch, heads, head_dim, state_dim)


def _chunks(value: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """[b, T, ...] -> [b, c, size, ...], padded at the end of T."""
    missing = -value.shape[1] % size
    if missing:
        value = jnp.pad(value, ((0, 0), (0, missing)) + ((0, 0),) * (value.ndim - 2), mode=mode)
    return value.reshape(value.shape[0], -1, size, *value.shape[2:])


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum with operands of one dtype, accumulated and returned in at least float32."""
    # Float32 products are asked for in full: TF32 would give the state three digits.
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    wide = at_least_float32(left.dtype)
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=wide)


def _cumulative_sum(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inclusive sums over the last axis as an unevaluated pair `high + low`.

    The difference of two float32 sums over a chunk is wrong by a rounding of the sums, not of the difference;
    `low` holds what rounding took from `high`, so that (high_i - high_j) + (low_i - low_j) is right to the last digit
    whatever the size of the sums. It is a correction of rounding alone and carries no gradient.
    """
    size = log_decay.shape[-1]
    ones = jnp.tril(jnp.ones((size, size), log_decay.dtype))
    high = _product("bchj,ij->bchi", log_decay, ones)
    now = jax.lax.stop_gradient(high)
    before = jnp.pad(now[..., :-1], ((0, 0),) * 3 + ((1, 0),))
    step = now - before
    # The rounding error of `step` itself (Knuth's two-sum).
    back = now - step
    error = (now - (step + back)) + (back - before)
    lost = (jax.lax.stop_gradient(log_decay) - step) - error
    return high, _product("bchj,ij->bchi", lost, ones)


def _exp(log_weight: jax.Array, keep: jax.Array | None) -> jax.Array:
    """exp, and 0 where `keep` is false."""
    # The exponent is masked, not the result: exp may overflow where masked, and 0 * inf is NaN in the gradient.
    return jnp.exp(log_weight if keep is None else jnp.where(keep, log_weight, -jnp.inf))


def _within_chunks(
    x: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    high: jax.Array,
    low: jax.Array,
    index: jax.Array | None,
) -> jax.Array:
    """Output [b, c, q, g, r, p] due to the steps of the same chunk."""
    b, c, size, g, r, _ = x.shape
    keep = jnp.tril(jnp.ones((size, size), bool))
    if index is not None:
        keep = keep & (index[:, :, None, :, None] == index[:, :, None, None, :])
    between = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    between = jnp.where(jnp.eye(size, dtype=bool), 0, between)  # see _to_end
    weights = _exp(between, keep) * dt[..., None, :]
    scores = _product("bcign,bcjgn->bcgij", C, B)
    attention = scores[:, :, :, None] * weights.reshape(b, c, g, r, size, size)
    return _product("bcgrij,bcjgrp->bcigrp", attention.astype(x.dtype), x)


def _chunk_states(
    x: jax.Array, dt: jax.Array, B: jax.Array, high: jax.Array, low: jax.Array, index: jax.Array | None
) -> jax.Array:
    """State [b, c, g, r, p, n] that each chunk's own steps leave at its end."""
    keep = None if index is None else (index == index[:, :, -1:])[:, :, None]
    to_end = _exp(_to_end(high) + _to_end(low), keep) * dt
    weighted = x.astype(dt.dtype) * jnp.moveaxis(to_end, 3, 2).reshape(*x.shape[:-1], 1)
    return _product("bcjgrp,bcjgn->bcgrpn", weighted.astype(x.dtype), B)


def _to_end(total: jax.Array) -> jax.Array:
    """Sum over the steps after each one, [b, c, h, q], from the inclusive sums."""
    # The last one is a constant 0, not total - total: as the largest weight it would add and take away the largest
    # gradient, and what float32 leaves of that drowns the gradient of the decays.
    rest = total[..., -1:] - total[..., :-1]
    return jnp.pad(rest, ((0, 0),) * 3 + ((0, 1),))


def _pass_states(
    states: jax.Array, log_decay: jax.Array, initial: jax.Array, index: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The state entering each chunk [b, c, g, r, p, n], and the one leaving the last [b, g, r, p, n]."""
    keep = None if index is None else (_index_before(index) == index[:, :, -1])[:, :, None]
    decay = _exp(log_decay, keep).reshape(*states.shape[:4], 1, 1)
    states = states.at[:, 0].add(decay[:, 0] * initial)

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    if states.shape[1] > 1:
        _, states = jax.lax.associative_scan(combine, (decay, states), axis=1)
    return jnp.concatenate([initial[:, None], states[:, :-1]], axis=1), states[:, -1]


def _from_entry_states(
    C: jax.Array, entry: jax.Array, log_decay: jax.Array, index: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Output [b, c, q, g, r, p] due to the state that enters the chunk."""
    keep = None if index is None else (index == _index_before(index)[:, :, None])[:, :, None]
    from_start = jnp.moveaxis(_exp(log_decay, keep), 3, 2)  # [b, c, q, h]
    y = _product("bcign,bcgrpn->bcigrp", C, entry.astype(dtype))
    return y * from_start.reshape(*y.shape[:-1], 1)


def _index_before(index: jax.Array) -> jax.Array:
    """Segment index [b, c] at the end of the chunk before; 0, the initial state's, for the first chunk."""
    return jnp.pad(index[:, :-1, -1], ((0, 0), (1, 0)))
