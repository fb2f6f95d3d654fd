"""Operands of the SSD kernels, and how their work is cut. Letters as in `ssd.pallas`."""

from __future__ import annotations

import dataclasses

import flax
import jax


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. Powers of two but for `strips`; no effect on results but rounding."""

    chunk: int
    """Q, steps of a chunk, 16 to 128."""
    width: int
    """Columns of P that one program takes, at least 16."""
    depth: int
    """Entries of N that are multiplied at once, at least 16; the state is held in pieces of that many."""
    strips: int = 1
    """S, pieces of the sequence that are walked at the same time."""
    backward_strips: int = 1
    """As `strips`, of `gradients`."""
    warps: int = 4
    """Of 32 threads each, that a program of `strip_states` or `outputs` has."""
    backward_warps: int = 4
    """As `warps`, of `gradients`."""
    stages: int = 1
    """Chunks whose loads the compiler may have under way at once."""


@flax.struct.dataclass
class Steps:
    """What the decays are made of."""

    dt: jax.Array  # [B, T, H] float32 (float64 only when interpreted)
    A: jax.Array  # [H] as dt
    index: jax.Array | None  # [B, T] int32 from `segment_index`


@flax.struct.dataclass
class Inputs:
    """Operands of the scan, but for states."""

    x: jax.Array  # [B, T, H, P]
    B: jax.Array  # [B, T, G, N] as x
    C: jax.Array  # [B, T, G, N] as x
    D: jax.Array | None  # [H] as dt
    steps: Steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a call."""

    batch: int
    time: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    tiles: Tiles

    @classmethod
    def of(cls, inputs: Inputs, tiles: Tiles) -> Plan:
        batch, time, heads, head_dim = inputs.x.shape
        groups, state_dim = inputs.B.shape[2:]
        return cls(batch, time, heads, head_dim, groups, state_dim, tiles)

    @property
    def walk(self) -> int:
        """Chunks of a strip."""
        return _cdiv(_cdiv(self.time, self.tiles.chunk), self.tiles.strips)

    @property
    def chunks(self) -> int:
        """Chunks of all strips; the last ones may lie behind the end."""
        return self.walk * self.tiles.strips

    @property
    def blocks(self) -> int:
        """Programs that share the P of one head."""
        return _cdiv(self.head_dim, self.tiles.width)

    @property
    def pieces(self) -> range:
        """Where the pieces of N begin."""
        return range(0, self.state_dim, self.tiles.depth)

    @property
    def programs(self) -> int:
        return self.batch * self.tiles.strips * self.blocks * self.heads


def padded(size: int) -> int:
    """The power of two, at least 16, that holds `size`: what Triton's matrix products take."""
    return max(16, 1 << (size - 1).bit_length())


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)
