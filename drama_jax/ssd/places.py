"""Where a program of the SSD kernels works: its batch row, head, strip and columns, as offsets into flat arrays.

The sequence is cut into strips of whole chunks. A program owns one head (or some of its P) of one strip and walks from
chunk to chunk. Letters as in `ssd`; Q steps of a chunk, `width` columns of P, `depth` entries of N, S strips.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from drama_jax.ssd import pallas
from drama_jax.ssd.tiles import Plan

Pieces = tuple[jax.Array, ...]
"""A state [width, N] in pieces [width, depth]."""
Where = tuple[jax.Array, jax.Array | None]
"""Offsets of a tile, and its mask; None is all."""


class Place:
    """Which batch row, head, strip and columns a program has."""

    def __init__(
        self, plan: Plan, batch: jax.Array, strip: jax.Array, head: jax.Array, block: jax.Array, pieces: Iterable[Any]
    ) -> None:
        """`block` of the columns of P; `pieces` are where those of N begin that the program takes."""
        self.plan, self.batch, self.strip, self.head, self.block = plan, batch, strip, head, block
        self.group, _ = pallas.quotient_and_rest(self.head, plan.heads // plan.groups)
        self.row = jnp.arange(plan.tiles.chunk, dtype=jnp.int32)
        self.p = self.block * plan.tiles.width + jnp.arange(plan.tiles.width, dtype=jnp.int32)
        self.n = [start + jnp.arange(plan.tiles.depth, dtype=jnp.int32) for start in pieces]
        # Masks that are known to be full are left out.
        self.p_valid = None if plan.head_dim % plan.tiles.width == 0 else self.p < plan.head_dim
        full = plan.state_dim % plan.tiles.depth == 0
        self.n_valid = [None if full else n < plan.state_dim for n in self.n]

    @classmethod
    def of_program(cls, plan: Plan, strips: range | None = None) -> Place:
        """One strip (of those given, all if none are), head and block of P for each program, and all of N."""
        strips = range(plan.tiles.strips) if strips is None else strips
        # Neighbouring programs take neighbouring heads: they read the same B and C, and the same lines of dt.
        rest, head = pallas.quotient_and_rest(pallas.program_id(), plan.heads)
        rest, block = pallas.quotient_and_rest(rest, plan.blocks)
        batch, strip = pallas.quotient_and_rest(rest, len(strips))
        return cls(plan, batch, strips.start + strip, head, block, plan.pieces)

    def chunk(self, k: jax.Array | int) -> Where:
        """Times [Q] of the strip's chunk k, and which of them are in the sequence; None if all are in every chunk."""
        time = (self.strip * self.plan.walk + k) * self.plan.tiles.chunk + self.row
        return time, None if self.plan.chunks * self.plan.tiles.chunk == self.plan.time else time < self.plan.time

    def along_p(self, time: jax.Array, valid: jax.Array | None) -> Where:
        """[Q, width] in arrays [B, T, H, P]."""
        start = ((self.batch * self.plan.time + time) * self.plan.heads + self.head) * self.plan.head_dim
        return start[:, None] + self.p[None, :], _both(valid, self.p_valid)

    def along_n(self, time: jax.Array, valid: jax.Array | None) -> list[Where]:
        """[Q, depth] of each piece in arrays [B, T, G, N]."""
        start = ((self.batch * self.plan.time + time) * self.plan.groups + self.group) * self.plan.state_dim
        return [(start[:, None] + n[None, :], _both(valid, inside)) for n, inside in zip(self.n, self.n_valid)]

    def partial(self, time: jax.Array, valid: jax.Array | None) -> list[Where]:
        """[Q, depth] of each piece in arrays [blocks, B, T, H, N]."""
        start = self.scalars(time) * self.plan.state_dim
        return [(start[:, None] + n[None, :], _both(valid, inside)) for n, inside in zip(self.n, self.n_valid)]

    def scalars(self, time: jax.Array) -> jax.Array:
        """Offsets [Q] in arrays [blocks, B, T, H]."""
        row = (self.block * self.plan.batch + self.batch) * self.plan.time + time
        return row * self.plan.heads + self.head

    def state(self, which: jax.Array | int, count: int) -> list[Where]:
        """[width, depth] of each piece in arrays [B, H, count, P, N]."""
        row = (self.batch * self.plan.heads + self.head) * count + which
        start = (row * self.plan.head_dim + self.p) * self.plan.state_dim
        return [(start[:, None] + n[None, :], _both(self.p_valid, inside)) for n, inside in zip(self.n, self.n_valid)]

    def start_of_walk(self, ends: Any, dtype: Any, *, reverse: bool) -> Pieces:
        """The pieces of the state, or of its gradient, with which the walk through the strip starts.

        Strip after strip, as there are few of them; a scan by XLA would be several launches for each of its levels.

        Args:
          ends: `tiles.Ends` of references.
          dtype: of the pieces.
          reverse: walked from the end.
        """
        strips, tiles = self.plan.tiles.strips, self.plan.tiles
        state = tuple(jnp.zeros((tiles.width, tiles.depth), dtype) for _ in self.n)
        if ends.first is not None:
            state = tuple(pallas.load(ends.first, *at) for at in self.state(0, 1))
        if ends.sums is None:
            return state

        def step(k: jax.Array, state: Pieces) -> Pieces:
            strip = strips - 1 - k if reverse else k
            decay = ends.decays[(self.batch * self.plan.heads + self.head) * strips + strip]
            added = (pallas.load(ends.sums, *at) for at in self.state(strip, strips))
            return tuple(decay * piece + more for piece, more in zip(state, added))

        return jax.lax.fori_loop(0, strips - 1 - self.strip if reverse else self.strip, step, state)


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """The mask of a tile from those of its rows and columns, of which None is all."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]
