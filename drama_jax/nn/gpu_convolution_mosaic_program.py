"""What the kernel of `nn.gpu_convolution_mosaic` does, and the shared memory that it does it in. Notation as there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from drama_jax.nn.gpu_cells import divide, in_phases

M = 64
"""Images of a tile: the rows of one asynchronous product."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work is shared out."""

    rows: int = 4
    """Output rows of a program; a divisor of h."""
    parts: int = 1
    """Warpgroups for each row, which share out the output channels."""
    stages: int = 2
    """Places for input in shared memory, each for the tiles of one column and 64 channels, or all if they are fewer."""
    behind: int = 1
    """Places that may wait to be filled again while the next is worked on."""


@dataclasses.dataclass(frozen=True)
class Form:
    """Which convolution it is."""

    silu: bool = False
    """Ends it."""
    from_phases: bool = False
    """Phases of 2x2 cells are read"""
    to_phases: bool = False
    """and written."""


def scratch(cut: Cut, weights: tuple[int, ...], out: int) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    return {
        "x": _tiles((cut.stages, cut.rows + 2, M, weights[-1]), weights[-1]),
        "weights": _tiles(weights, weights[-1]),
        "bias": plgpu.SMEM((out + -out % 32,), jnp.float32),  # copies are of 128 bytes
        "y": _output((cut.rows * cut.parts, M, out // cut.parts)),
        "ready": plgpu.Barrier(num_arrivals=cut.rows + 2, num_barriers=cut.stages),
        "done": plgpu.Barrier(num_arrivals=cut.rows * cut.parts, num_barriers=cut.stages),
        "common": plgpu.Barrier(num_arrivals=2, num_barriers=1),
    }


def _tiles(shape: tuple[int, ...], columns: int) -> Any:
    """A bfloat16 buffer, swizzled as the products want it, in tiles of so many columns."""
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _output(shape: tuple[int, ...]) -> Any:
    """Likewise, for results."""
    columns = next((columns for columns in (64, 32, 16) if shape[-1] % columns == 0), None)
    return plgpu.SMEM(shape, jnp.bfloat16) if columns is None else _tiles(shape, columns)


def program(
    x: Any,
    weights: Any,
    biases: Any,
    y: Any,
    smem: Any,
    *,
    height: int,
    width: int,
    above: int,
    form: Form,
    cut: Cut,
) -> None:
    """64 images and a strip of rows, all columns.

    x is [S N, (row, column, block), channel], with phases [S N, (cell row, cell column, phase, block), channel],
    and lacks `above` rows of zeros over each image; y is written.
    """
    me = jax.lax.axis_index("warpgroup")
    group, strip = divide(jax.lax.axis_index("program"), height // cut.rows)
    mine, part = divide(me, cut.parts)
    taps, padded = smem["weights"].shape[0], smem["bias"].shape[0]
    walk = _Walk(
        x, y, smem, form, cut, me, mine, part,
        images=pl.ds(group * M, M), top=strip * cut.rows, above=above, width=width,
        blocks=taps // (3 * cut.parts), out=weights.shape[1] // 3,
    )  # fmt: skip

    @pl.when(me == 0)
    def _() -> None:
        kernel = divide(group, x.shape[0] // (M * (weights.shape[0] // taps)))[0]
        plgpu.copy_gmem_to_smem(weights.at[pl.ds(kernel * taps, taps)], smem["weights"], smem["common"])
        plgpu.copy_gmem_to_smem(biases.at[pl.ds(kernel * padded, padded)], smem["bias"], smem["common"])
        for t in range(cut.stages):
            walk.fetch(jnp.int32(t))

    plgpu.barrier_wait(smem["common"])
    load: Any = plgpu.load  # of jax 0.11; that of 0.10 has other arguments
    bias = load(smem["bias"].at[pl.ds(part * walk.out, walk.out)], layout=plgpu.Layout.WGMMA.reduce(0))
    walk = dataclasses.replace(walk, bias=bias)
    zeros = plgpu.layout_cast(jnp.zeros((M, walk.out), jnp.float32), plgpu.Layout.WGMMA)
    last, _ = jax.lax.fori_loop(0, width, walk.step, (zeros, zeros))
    walk.store(last, jnp.int32(width - 1))
    plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One warpgroup's walk over the columns. Tiles of input are numbered by t: column by column, `blocks` in each."""

    x: Any
    y: Any
    smem: Any
    form: Form
    cut: Cut
    me: jax.Array
    """Number of the warpgroup, which has"""
    mine: jax.Array
    """this one of the program's rows"""
    part: jax.Array
    """and this part of the output channels."""
    images: Any
    """Slice of 64."""
    top: jax.Array
    """First row of the program."""
    above: int
    width: int
    blocks: int
    """Of input channels."""
    out: int
    """Output channels of the warpgroup."""
    bias: Any = None
    """[out] float32, once it is there."""

    @property
    def total(self) -> int:
        """Tiles of a row."""
        return self.width * self.blocks

    def fetch(self, t: Any) -> None:
        """Starts the copies of the tiles t of all rows of input."""
        slot = divide(t, self.cut.stages)[1]
        for j in range(self.cut.rows + 2):
            tile = self.x.at[self.images, self.place(self.top + j - self.above, t)]
            plgpu.copy_gmem_to_smem(tile, self.smem["x"].at[slot, j], self.smem["ready"].at[slot])

    def place(self, row: jax.Array, t: Any) -> jax.Array:
        """Of the tile t of a row, from -1 on, in x; outside the image it is outside of x."""
        if not self.form.from_phases:
            return row * self.total + t
        column, block = divide(t, self.blocks)
        cell, phase = in_phases(row + 2, column, self.width)  # two more: what follows is not for negative numbers
        return ((cell - self.width // 2) * 4 + phase) * self.blocks + block

    def step(self, column: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Takes a column of input; carries the sums of the output columns before it and at it."""

        def products(acc: Any) -> jax.Array:
            for block in range(self.blocks):
                self.multiply(acc, column * self.blocks + block, block)
            return acc[...]

        found = pl.run_scoped(products, plgpu.ACC((M, 3 * self.out), jnp.float32))
        before, here = carry

        @pl.when(column > 0)
        def _() -> None:
            self.store(before + found[:, : self.out], column - 1)

        return here + found[:, self.out : 2 * self.out], found[:, 2 * self.out :]

    def multiply(self, acc: Any, t: Any, block: int) -> None:
        """Adds what tile t, of that block, has for the three columns around its own."""
        cut, later = self.cut, t - self.cut.behind + self.cut.stages

        @pl.when((self.me == 0) & (t >= cut.behind) & (later < self.total))
        def _() -> None:
            plgpu.barrier_wait(self.smem["done"].at[divide(later, cut.stages)[1]])
            self.fetch(later)

        slot = divide(t, cut.stages)[1]
        plgpu.barrier_wait(self.smem["ready"].at[slot])
        for dy in range(3):
            taps = self.smem["weights"].at[(dy * self.blocks + block) * cut.parts + self.part]
            plgpu.wgmma(acc, self.smem["x"].at[slot, self.mine + dy], taps.transpose((1, 0)))
        plgpu.wgmma_wait(0)

        @pl.when(t + cut.stages < self.total)
        def _() -> None:
            plgpu.barrier_arrive(self.smem["done"].at[slot])

    def store(self, sums: jax.Array, column: Any) -> None:
        """Ends a column of output and starts to write it."""
        sums = sums + jax.lax.broadcast_in_dim(self.bias, sums.shape, (1,))
        if self.form.silu:
            half = 0.5 * sums
            sums = half * jnp.tanh(half) + half
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the column before
        self.smem["y"][self.me] = sums.astype(self.y.dtype)
        plgpu.commit_smem()
        row = self.top + self.mine
        cell, phase = in_phases(row, column, self.width) if self.form.to_phases else (row * self.width + column, 0)
        channels = pl.ds((phase * self.cut.parts + self.part) * self.out, self.out)
        plgpu.copy_smem_to_gmem(self.smem["y"].at[self.me], self.y.at[self.images, cell, channels])
