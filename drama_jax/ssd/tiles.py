"""Operands of the SSD kernels, and how their work is cut. Letters as in `ssd.places`."""

from __future__ import annotations

import dataclasses

import flax
import jax
import jax.numpy as jnp

ENOUGH = 256
"""Programs from which on `gradients` is not cut into strips: each strip then costs more than it gains."""


@dataclasses.dataclass(frozen=True)
class Apart:
    """How the kernels of `gpu_backward_apart` are cut, besides what `Tiles` says."""

    depth: int
    """As that of `Tiles`, of the kernel for dB and dC."""
    warps: int = 4
    """Of that kernel."""
    parts: int = 1
    """Programs that share the heads of a group, as far as it divides their number."""


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
    apart: Apart | None = None
    """How `gpu_backward_apart` takes the place of `gradients`; None if it does not."""


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


@flax.struct.dataclass
class Ends:
    """What the walk through a strip starts from, made of those walked before it; states, or gradients of states."""

    first: jax.Array | None  # [B, H, P, N] as dt, what the first walk of all starts from; None for zeros
    sums: jax.Array | None  # [B, H, S, P, N] as dt, what each strip adds; None for one strip
    decays: jax.Array | None  # [B, H, S] as dt, of a state over each strip; None for one strip


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


CUTS: dict[str, list[tuple[int, int, Tiles]]] = {
    "bfloat16": [
        (32, 1024, Tiles(chunk=32, width=64, depth=16)),
        (64, 256, Tiles(chunk=32, width=64, depth=32, warps=8, backward_warps=8)),
        (128, 264, Tiles(chunk=64, width=64, depth=128, stages=2, apart=Apart(depth=64))),
        (256, 256, Tiles(chunk=64, width=32, depth=64, warps=8, backward_warps=8)),
    ],
    "float32": [
        (64, 256, Tiles(chunk=16, width=32, depth=16)),
        (128, 256, Tiles(chunk=16, width=32, depth=32)),
        (256, 256, Tiles(chunk=16, width=16, depth=32)),
    ],
}
"""Largest N, and up to it how many programs the strips may make, and the cut. In bfloat16, N to 32 is the fastest of
`python -m benchmarks.ssd --tune` on a card, and N to 128 of those of `--tune --strips` and by hand
(benchmarks/README.md), with two programs per multiprocessor of an H100. The others are, of the cuts tried with the
compiler for an H100, those with the fewest registers spilt."""


def default_tiles(x: jax.Array, B: jax.Array) -> Tiles:
    """How to cut x [B, T, H, P] and B [B, T, G, N]: `CUTS`, and as many strips as the programs allow."""
    batch, time, heads, head_dim = x.shape
    state_dim = padded(B.shape[-1])
    cuts = CUTS["bfloat16" if x.dtype == jnp.bfloat16 else "float32"]
    most, cut = next((most, cut) for largest, most, cut in cuts if state_dim <= largest)
    chunk, width = min(cut.chunk, padded(time)), min(cut.width, padded(head_dim))
    chunks = _cdiv(time, chunk)
    programs = batch * heads * _cdiv(head_dim, width)
    # A strip costs a second reading of its inputs: four chunks or more make that worth while.
    strips = max(1, min(most // programs, chunks // 4))
    return dataclasses.replace(
        cut,
        chunk=chunk,
        width=width,
        depth=min(cut.depth, state_dim),
        strips=strips,
        backward_strips=strips if programs < ENOUGH else 1,
    )


def padded(size: int) -> int:
    """The power of two, at least 16, that holds `size`: what Triton's matrix products take."""
    return max(16, 1 << (size - 1).bit_length())


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)
