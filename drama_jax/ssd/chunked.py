"""The SSD scan as matrix products inside chunks and an associative scan over the chunks' states.

Dao & Gu 2024, section 6: with Q steps a chunk, the influence of step j on step i of the same chunk is a masked
attention matrix C_i.B_j exp(sum of dt A over (j, i]) dt_j; everything older reaches the chunk through one state.
The backward pass keeps the operands and the chunks' states, and computes what is inside the chunks again: memory is
linear in T.

Shapes: b batch, c chunks, q (or i, j) steps of a chunk, g groups, r heads of a group, h = g * r heads, p head dim,
n state dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from drama_jax.precision import at_least_float32
from drama_jax.ssd.recurrence import compose
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
    log_decay = dts * A.astype(wide)[:, None]

    y = _within_chunks(xs, dts, Bs, Cs, log_decay, index)
    chunk_states = _chunk_states(xs, dts, Bs, log_decay, index)
    from_zero = initial_state is None
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state_dim), wide)
    first = initial_state.astype(wide).reshape(batch, groups, -1, head_dim, state_dim)
    entry, final = _pass_states(chunk_states, jnp.sum(log_decay, axis=-1), first, index)
    if not (from_zero and time <= size):
        y = y + _from_entry_states(Cs, entry, log_decay, index, x.dtype)

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


@jax.custom_vjp
def _between(log_decay: jax.Array) -> jax.Array:
    """Sums [b, c, h, i, j] of log_decay [b, c, h, q] over the steps after j up to i; i >= j, no matter what elsewhere.

    Differences of inclusive sums, and of what rounding took from them: the difference of two float32 sums over a chunk
    is wrong by a rounding of the sums, not of the difference.
    """
    high = _sums(log_decay, after=False)
    before = jnp.pad(high[..., :-1], ((0, 0),) * 3 + ((1, 0),))
    step = high - before
    # The rounding error of `step` itself (Knuth's two-sum).
    back = high - step
    error = (high - (step + back)) + (back - before)
    low = _sums((log_decay - step) - error, after=False)
    return (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])


def _between_forward(log_decay: jax.Array) -> tuple[jax.Array, None]:
    return _between(log_decay), None


def _between_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Step t is in the sums with i >= t > j. As a difference of sums over all i and j, which the automatic gradient is,
    # the gradient of strong decays would drown in what float32 leaves of the others.
    size = gradient.shape[-1]
    earlier = jnp.triu(jnp.ones((size, size), gradient.dtype), 1)  # j < t
    return (jnp.sum(jnp.tril(_product("bchij,jt->bchit", gradient, earlier)), axis=-2),)


_between.defvjp(_between_forward, _between_backward)


def _sums(log_decay: jax.Array, *, after: bool) -> jax.Array:
    """Sums over the last axis: up to each step, or over the steps after each."""
    size = log_decay.shape[-1]
    ones = jnp.ones((size, size), log_decay.dtype)
    return _product("bchj,ij->bchi", log_decay, jnp.triu(ones, 1) if after else jnp.tril(ones))


def _exp(log_weight: jax.Array, keep: jax.Array | None) -> jax.Array:
    """exp, and 0 where `keep` is false."""
    # The exponent is masked, not the result: exp may overflow where masked, and 0 * inf is NaN in the gradient.
    return jnp.exp(log_weight if keep is None else jnp.where(keep, log_weight, -jnp.inf))


@jax.checkpoint
def _within_chunks(
    x: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    log_decay: jax.Array,
    index: jax.Array | None,
) -> jax.Array:
    """Output [b, c, q, g, r, p] due to the steps of the same chunk."""
    b, c, size, g, r, _ = x.shape
    keep = jnp.tril(jnp.ones((size, size), bool))
    if index is not None:
        keep = keep & (index[:, :, None, :, None] == index[:, :, None, None, :])
    weights = _exp(_between(log_decay), keep) * dt[..., None, :]
    scores = _product("bcign,bcjgn->bcgij", C, B)
    attention = scores[:, :, :, None] * weights.reshape(b, c, g, r, size, size)
    return _product("bcgrij,bcjgrp->bcigrp", attention.astype(x.dtype), x)


@jax.checkpoint
def _chunk_states(
    x: jax.Array, dt: jax.Array, B: jax.Array, log_decay: jax.Array, index: jax.Array | None
) -> jax.Array:
    """State [b, c, g, r, p, n] that each chunk's own steps leave at its end."""
    keep = None if index is None else (index == index[:, :, -1:])[:, :, None]
    to_end = _exp(_sums(log_decay, after=True), keep) * dt
    weighted = x.astype(dt.dtype) * jnp.moveaxis(to_end, 3, 2).reshape(*x.shape[:-1], 1)
    return _product("bcjgrp,bcjgn->bcgrpn", weighted.astype(x.dtype), B)


def _pass_states(
    states: jax.Array, log_decay: jax.Array, initial: jax.Array, index: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The state entering each chunk [b, c, g, r, p, n], and the one leaving the last [b, g, r, p, n]."""
    keep = None if index is None else (_index_before(index) == index[:, :, -1])[:, :, None]
    decay = _exp(log_decay, keep).reshape(*states.shape[:4], 1, 1)
    states = states.at[:, 0].add(decay[:, 0] * initial)

    if states.shape[1] > 1:
        _, states = jax.lax.associative_scan(compose, (decay, states), axis=1)
    return jnp.concatenate([initial[:, None], states[:, :-1]], axis=1), states[:, -1]


@functools.partial(jax.checkpoint, static_argnums=4)
def _from_entry_states(
    C: jax.Array, entry: jax.Array, log_decay: jax.Array, index: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Output [b, c, q, g, r, p] due to the state that enters the chunk."""
    keep = None if index is None else (index == _index_before(index)[:, :, None])[:, :, None]
    from_start = jnp.moveaxis(_exp(_sums(log_decay, after=False), keep), 3, 2)  # [b, c, q, h]
    y = _product("bcign,bcgrpn->bcigrp", C, entry.astype(dtype))
    return y * from_start.reshape(*y.shape[:-1], 1)


def _index_before(index: jax.Array) -> jax.Array:
    """Segment index [b, c] at the end of the chunk before; 0, the initial state's, for the first chunk."""
    return jnp.pad(index[:, :-1, -1], ((0, 0), (1, 0)))
