"""The recurrence of RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892), with per-step resets.

Per head, with a state s [P, P] and a decay w_t = exp(log_decay_t) in (0, 1) for every key channel:

    y_t = r_t (s_(t-1) + diag(u) k_t^T v_t)
    s_t = diag(w_t) s_(t-1) + k_t^T v_t

Over a sequence, chunks of Q steps are taken at once. Every decay between two steps of a chunk is the exponential of a
sum of the log decays that lie between them, formed by a product with zeros and ones: no exponent is positive and
nothing is subtracted, so that decays of any strength neither overflow nor lose digits.

Shapes: B batch, T time, H heads, P head dim, Q chunk length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from drama_jax import checks
from drama_jax.precision import at_least_float32

_HIGHEST = jax.lax.Precision.HIGHEST


def wkv(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    u: jax.Array,
    state: jax.Array,
    *,
    index: jax.Array | None = None,
    chunk_size: int = 16,
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over a sequence; the gradient keeps the states between chunks alone.

    Args:
      r: `[B, T, H, P]` float, receptance.
      k: `[B, T, H, P]` float, keys.
      v: `[B, T, H, P]` float, values.
      log_decay: `[B, T, H, P]`, at most 0.
      u: `[H, P]`, the weight of the step's own key.
      state: `[B, H, P, P]` float (key, value), before the first step.
      index: optional `[B, T]` int32 from `segment_index`; `state` belongs to index 0.
      chunk_size: Q; no effect on the result but rounding. Intermediate arrays are `[B, H, Q, Q, P]`.

    Returns:
      y `[B, T, H, P]` and the state after the last step, in at least float32.

    Raises:
      TypeError, ValueError: on arguments that are no arrays, or shapes or dtypes that do not fit.
    """
    checks.arrays("wkv", r=(r, ("B", "T", "H", "P"), "float"))
    checks.arrays(
        "wkv",
        dict(zip("BTHP", r.shape)),
        k=(k, ("B", "T", "H", "P"), "float"),
        v=(v, ("B", "T", "H", "P"), "float"),
        log_decay=(log_decay, ("B", "T", "H", "P"), "float"),
        u=(u, ("H", "P"), "float"),
        state=(state, ("B", "H", "P", "P"), "float"),
        index=(index, ("B", "T"), "int32 or None"),
    )
    batch, time = r.shape[:2]
    checks.integers("wkv", T=time, chunk_size=chunk_size)
    wide, size = at_least_float32(r.dtype), min(chunk_size, time)
    missing = -time % size
    index = jnp.zeros((batch, time), jnp.int32) if index is None else index
    # A padded step has no key and does not decay; it belongs to the last segment.
    index = jnp.pad(index, ((0, 0), (0, missing)), mode="edge")
    index = index.reshape(batch, -1, size).swapaxes(0, 1)

    def chunks(value: jax.Array) -> jax.Array:
        """[B, T, H, P] -> [chunks, B, H, Q, P]."""
        value = jnp.pad(value.astype(wide), ((0, 0), (0, missing), (0, 0), (0, 0)))
        return value.reshape(batch, -1, size, *value.shape[2:]).transpose(1, 0, 3, 2, 4)

    @jax.checkpoint
    def body(
        carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, before = carry
        r, k, v, log_decay, index = now
        y, state = _chunk(r, k, v, log_decay, u.astype(wide), state, before, index)
        return (state, index[:, -1]), y

    start = (state.astype(wide), jnp.zeros((batch,), jnp.int32))
    (state, _), y = jax.lax.scan(body, start, (*map(chunks, (r, k, v, log_decay)), index))
    y = y.transpose(1, 0, 3, 2, 4).reshape(batch, time + missing, *r.shape[2:])
    return y[:, :time], state


def _chunk(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    u: jax.Array,
    state: jax.Array,
    before: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One chunk: operands [B, H, Q, P], segment of the state [B] and of the steps [B, Q] -> y, state."""
    steps = jnp.arange(r.shape[2])
    t, i, j = steps[:, None, None], steps[:, None], steps
    # [t, i, j]: whether the decay of step j acts on the key of step i before step t reads it.
    between = ((i < j) & (j < t)).astype(r.dtype)
    decay = jnp.exp(jnp.einsum("tij,bhjp->bhtip", between, log_decay, precision=_HIGHEST))
    seen = (index[:, :, None] == index[:, None]) & (steps[:, None] > steps)
    scores = jnp.where(seen[:, None], jnp.sum(r[:, :, :, None] * k[:, :, None] * decay, axis=-1), 0)
    y = jnp.einsum("bhti,bhip->bhtp", scores, v, precision=_HIGHEST)
    y = y + jnp.sum(r * u[:, None] * k, axis=-1, keepdims=True) * v
    # What the state was when the chunk began, as each step sees it.
    total = jnp.cumsum(log_decay, axis=2)
    held = (index == before[:, None])[:, None, :, None]
    reach = jnp.where(held, jnp.exp(jnp.pad(total[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))), 0)
    y = y + jnp.einsum("bhtp,bhpn->bhtn", r * reach, state, precision=_HIGHEST)
    # What of state and keys is left at the chunk's end.
    after = (i < j).astype(r.dtype)  # [i, j]: whether step j decays the key of step i
    rest = jnp.exp(jnp.einsum("ij,bhjp->bhip", after, log_decay, precision=_HIGHEST))
    rest = jnp.where((index == index[:, -1:])[:, None, :, None], rest, 0)
    kept = jnp.where((index[:, -1] == before)[:, None, None], jnp.exp(total[:, :, -1]), 0)
    return y, kept[..., None] * state + jnp.einsum("bhip,bhin->bhpn", k * rest, v, precision=_HIGHEST)


def wkv_step(
    r: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, u: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step: operands [B, H, P], u [H, P], state [B, H, P, P] -> y [B, H, P] and the state, at least float32."""
    wide, sizes = at_least_float32(r.dtype), ("B", "H", "P")
    checks.arrays(
        "wkv_step",
        **{name: (value, sizes, "float") for name, value in zip("rkv", (r, k, v))},
        log_decay=(log_decay, sizes, "float"),
    )
    checks.arrays(
        "wkv_step", dict(zip("BHP", r.shape)), u=(u, ("H", "P"), "float"), state=(state, ("B", "H", "P", "P"), "float")
    )
    r, k, v, log_decay, u, state = (a.astype(wide) for a in (r, k, v, log_decay, u, state))
    added = k[..., None] * v[..., None, :]
    y = jnp.sum(r[..., None] * (state + u[..., None] * added), axis=-2)
    return y, jnp.exp(log_decay)[..., None] * state + added
