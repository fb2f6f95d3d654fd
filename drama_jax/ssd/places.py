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
    def of_program(cls, plan: Plan) -> Place:
        """One strip, head and block of P for each program, and all of N."""
        # Neighbouring programs take neighbouring heads: they read the same B and C, and the same lines of dt.
        rest, head = pallas.quotient_and_rest(pallas.program_id(), plan.heads)
        rest, block = pallas.quotient_and_rest(rest, plan.blocks)
        batch, strip = pallas.quotient_and_rest(rest, plan.tiles.strips)
        return cls(plan, batch, strip, head, block, plan.pieces)

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

    def strip_state(self, states: Any, dtype: Any) -> Pieces:
        """The pieces of the strip's state from `[B, H, S, P, N]`, zeros if that is None."""
        tiles = self.plan.tiles
        if states is None:
            return tuple(jnp.zeros((tiles.width, tiles.depth), dtype) for _ in self.n)
        return tuple(pallas.load(states, *at) for at in self.state(self.strip, tiles.strips))


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """The mask of a tile from those of its rows and columns, of which None is all."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]
