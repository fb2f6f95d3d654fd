"""Step sizes and decays of one chunk, as the SSD kernels need them.

The sum of dt A over a chunk is split into multiples of a power of two, which add up without any rounding, and small
rests, so that the difference of two sums is right to the last digit. Exponents are masked, not exponentials, and none
is positive: no decay overflows, and none that is masked leaves a NaN in a gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drama_jax.ssd import pallas
from drama_jax.ssd.places import Place


class Decays:
    """Step sizes and decays of one chunk."""

    def __init__(self, place: Place, steps: Any, time: jax.Array, valid: jax.Array | None) -> None:
        """Reads dt, A and the segment index at `time` [Q]; `steps` is `tiles.Steps` of references."""
        plan = place.plan
        # Comparisons below are of times, not of positions in the chunk: those would be the same in every chunk, and
        # be kept in registers by the thousand.
        self.time = time
        offset = (place.batch * plan.time + time) * plan.heads + place.head
        self.dt = pallas.load(steps.dt, offset, valid)
        self.A = steps.A[place.head]
        coarse, fine = _split(self.dt * self.A)
        self.coarse, self.fine = jnp.cumsum(coarse), jnp.cumsum(fine)
        self.coarse_end, self.fine_end = jnp.sum(coarse), jnp.sum(fine)
        self.index: jax.Array | None = None
        if steps.index is not None:
            start = place.batch * plan.time
            last = plan.time - 1
            first = jnp.min(time)
            self.index = pallas.load(steps.index, start + jnp.minimum(time, last), None)
            self.index_end = steps.index[start + jnp.minimum(first + plan.tiles.chunk - 1, last)]
            # The state before the first step belongs to index 0.
            before = steps.index[start + jnp.clip(first - 1, 0, last)]
            self.index_before = jnp.where(first == 0, 0, before)

    def between(self, *, transposed: bool = False) -> jax.Array:
        """[Q, Q], row i, column j <= i: the decay of what entered at j as seen at i; 0 elsewhere."""

        def pairs(of_i: jax.Array, of_j: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (of_i[None, :], of_j[:, None]) if transposed else (of_i[:, None], of_j[None, :])

        i, j = pairs(self.time, self.time)
        keep = i >= j
        if self.index is not None:
            i, j = pairs(self.index, self.index)
            keep = keep & (i == j)
        (coarse_i, coarse_j), (fine_i, fine_j) = pairs(self.coarse, self.coarse), pairs(self.fine, self.fine)
        exponent = (coarse_i - coarse_j) + (fine_i - fine_j)
        return jnp.exp(jnp.where(keep, exponent, -jnp.inf))

    def from_start(self) -> jax.Array:
        """[Q]: the decay of the entering state as seen at each step."""
        return self._exp(self.coarse + self.fine, self.index, "index_before")

    def to_end(self) -> jax.Array:
        """[Q]: the decay of what entered at each step as seen at the end of the chunk."""
        exponent = (self.coarse_end - self.coarse) + (self.fine_end - self.fine)
        return self._exp(exponent, self.index, "index_end")

    def whole(self) -> jax.Array:
        """The decay of the entering state over the chunk, a scalar."""
        index = None if self.index is None else self.index_end
        return self._exp(self.coarse_end + self.fine_end, index, "index_before")

    def _exp(self, exponent: jax.Array, index: jax.Array | None, same: str) -> jax.Array:
        if index is not None:
            exponent = jnp.where(index == getattr(self, same), exponent, -jnp.inf)
        return jnp.exp(exponent)


def scaled(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """rows [Q, ..] times weight [Q], in the dtype of rows."""
    return (rows.astype(weight.dtype) * weight[:, None]).astype(rows.dtype)


def _split(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiples of a power of two that add up exactly over 128 steps, and the rests."""
    # No decay below the limit differs from 0, and float32 holds sums up to 128 steps of it in units of the grid.
    limit, grid = (128.0, 2.0**-10) if log_decay.dtype == jnp.float32 else (1024.0, 2.0**-20)
    log_decay = jnp.maximum(log_decay, -limit)
    coarse = (log_decay * (1 / grid)).astype(jnp.int32).astype(log_decay.dtype) * grid
    return coarse, log_decay - coarse
