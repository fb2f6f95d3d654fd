"""The equations of the SSD scan's backward pass inside one chunk, as parts of kernels.

With s the state that enters a chunk of steps 1 to Q, ds the gradient of the state that leaves it, the decays of
`decays`, and for j <= i

    scores_ij = (C_i . B_j) between_ij          what of dt_j x_j is in y_i
    inner_ij  = (dy_i . x_j) between_ij dt_j    the gradient of C_i . B_j
    pairs_ij  = scores_ij (dy_i . x_j)
    exit_j    = to_end_j x_j . ds B_j           through the chunk's end
    entry_i   = from_start_i dy_i . s C_i       through its start

the gradients are

    v_j  = sum over i of scores_ij dy_i + to_end_j ds B_j                      gradient of dt_j x_j
    dx_j = dt_j v_j + D dy_j,   dD = sum over i of dy_i . x_i                  (`by_x`)
    dB_j = sum over i of inner_ij C_i + dt_j to_end_j x_j ds
    dC_i = sum over j of inner_ij B_j + from_start_i dy_i s
    ds   becomes  whole ds + sum over i of from_start_i dy_i (outer) C_i
    da_t = sum over j < t <= i of pairs_ij dt_j + sum over j < t of dt_j exit_j
           + sum over i >= t of entry_i + whole <s, ds>                        gradient of dt_t A (`by_log_decays`)
    ddt_t = v_t . x_t + A da_t,   dA = sum over t of dt_t da_t                 (`by_dt`)

Arrays of pairs are held transposed, [j, i]. Letters as in `places`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from drama_jax.ssd import pallas
from drama_jax.ssd.decays import Decays
from drama_jax.ssd.gpu_forward import Dot
from drama_jax.ssd.places import Place, Where


class Chunk(NamedTuple):
    """What a program reads of one chunk, and where."""

    time: jax.Array  # [Q]
    valid: jax.Array | None  # [Q] bool, in the sequence; None if all are
    head: jax.Array  # a scalar
    at_p: Where  # [Q, width] in arrays [B, T, H, P]
    at_n: list[Where]  # [Q, depth] of each piece in arrays [B, T, G, N]
    x: jax.Array  # [Q, width]
    dy: jax.Array  # [Q, width]
    D: Any  # reference to [H], None if absent; not read here, or its number would take a register from the start on
    decays: Decays
    dt: jax.Array  # [Q]
    to_end: jax.Array  # [Q]
    from_start: jax.Array  # [Q]
    whole: jax.Array  # a scalar

    @classmethod
    def of(cls, place: Place, inputs: Any, dy: Any, k: jax.Array | int) -> Chunk:
        """The strip's chunk k; `inputs` is `tiles.Inputs` of references, `dy` a reference."""
        time, valid = place.chunk(k)
        at_p, at_n = place.along_p(time, valid), place.along_n(time, valid)
        decays = Decays(place, inputs.steps, time, valid)
        weights = (decays.dt, decays.to_end(), decays.from_start(), decays.whole())
        x, dy = pallas.load(inputs.x, *at_p), pallas.load(dy, *at_p)
        return cls(time, valid, place.head, at_p, at_n, x, dy, inputs.D, decays, *weights)

    def earlier(self) -> jax.Array:
        """[j, i]: whether step j is before step i."""
        return self.time[:, None] < self.time[None, :]

    def diagonal(self, pairs: jax.Array) -> jax.Array:
        """pairs [Q, Q] with all but the diagonal 0."""
        return jnp.where(self.time[:, None] == self.time[None, :], pairs, 0)


def by_x(chunk: Chunk, scores: jax.Array, reach: jax.Array, dot: Dot) -> jax.Array:
    """dx [Q, width] from scores [j, i] and `reach` [Q, width], ds B_j."""
    v = chunk.to_end[:, None] * reach + dot(scores.astype(chunk.x.dtype), chunk.dy)
    dx = chunk.dt[:, None] * v
    return dx if chunk.D is None else dx + chunk.D[chunk.head] * chunk.dy.astype(dx.dtype)


class Inside(NamedTuple):
    """Sums of pairs_ij, which passes inside the chunk."""

    from_j: jax.Array  # [Q], of all i > j
    alone: jax.Array  # [Q], of i = j
    crossing: jax.Array  # [j, t], of all i >= t if j < i, times dt_j

    @classmethod
    def of(cls, chunk: Chunk, pairs: jax.Array, dot: Dot) -> Inside:
        """From pairs [j, i]."""
        passing = jnp.where(chunk.earlier(), pairs, 0)
        from_j = jnp.sum(passing, axis=1)
        alone = jnp.sum(chunk.diagonal(pairs), axis=1)
        return cls(from_j, alone, _from_column(passing * chunk.dt[:, None], chunk.time, chunk.x.dtype, dot))


class Through(NamedTuple):
    """What passes through the chunk's ends."""

    exit_j: jax.Array  # [Q], to_end_j x_j . ds B_j
    entry_i: jax.Array  # [Q], from_start_i dy_i . s C_i
    whole: jax.Array  # a scalar, <s, ds>


def by_log_decays(chunk: Chunk, inside: Inside, through: Through) -> jax.Array:
    """da [Q]. The decay of step t takes part in what passes from before t to t or later.

    That is from earlier steps, to the end of the chunk, from its start. Each is added up by itself: as a difference of
    sums over all steps, which is less work, strong decays would drown in what float32 leaves of it.
    """
    later = inside.crossing + (chunk.dt * through.exit_j)[:, None]
    da = jnp.where(chunk.earlier(), later, through.entry_i[:, None])
    return jnp.sum(da, axis=0) + chunk.whole * through.whole


def by_dt(chunk: Chunk, inside: Inside, through: Through, da: jax.Array) -> jax.Array:
    """ddt [Q]."""
    return inside.from_j + inside.alone + through.exit_j + chunk.decays.A * da


def _from_column(pairs: jax.Array, time: jax.Array, dtype: Any, dot: Dot) -> jax.Array:
    """Sums [Q, Q] along the rows of pairs, each from a column on, as a product with ones."""
    ones = (time[:, None] >= time[None, :]).astype(dtype)
    low = pairs.astype(dtype)
    if dtype == pairs.dtype:
        return dot(low, ones)
    return dot(low, ones) + dot((pairs - low.astype(pairs.dtype)).astype(dtype), ones)
