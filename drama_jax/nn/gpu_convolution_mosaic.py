"""3x3 convolutions of many images as GPU kernels through Pallas's newer GPU lowering, Mosaic, with a fused end.

The rows of a product are 64 images at one cell, so that no tap crosses the edge of a tile: the tile of a neighbouring
cell is another place in memory, and outside the image TMA fills in zeros. A program has 64 images and a strip of output
rows, a warpgroup or two for each; it walks over the columns, and each input tile, loaded once, serves the output rows
around it and, by weights side by side, three output columns at once, whose sums move along.

Needs JAX 0.11 (made with 0.11.2) and an H100 or H200; `benchmarks/conv_mosaic.py` measures the choices.
Notation as in `nn.gpu_convolution`; S kernels, one for each seed under `vmap`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from drama_jax.nn.gpu_cells import FULL, divide

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


FASTEST = {
    (64, 32): Cut(),
    (64, 16): Cut(),
    (128, 48): Cut(rows=2, stages=3, behind=2),
    (16, 64): Cut(rows=2, parts=2),
}
"""By input and output channels, which are those of preset xs."""


def cut_for(x: jax.Array, out_channels: int) -> Cut | None:
    """How to share out the convolution of x [N, h, w, I], or None where `nn.gpu_convolution_triton` is to be used."""
    images, height, width, channels = x.shape
    cut = FASTEST.get((channels, out_channels))
    if cut is None or x.dtype != jnp.bfloat16 or images % M or height % cut.rows or width % 2:
        return None
    return cut if images // M * (height // cut.rows) >= FULL // 2 else None


def conv3x3(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    ends: bool,
    cut: Cut,
    name: str = "conv3x3",
    interpret: Any = None,
) -> jax.Array:
    """3x3 convolution with zero padding and bias, all of bfloat16 but the bias.

    Args:
      x: [N, h, w, I]; N is a multiple of 64, I is 16, 32 or a multiple of 64, h and w are even.
      kernel: [3, 3, I, O], O = 16, 32, 48 or 64.
      bias: [O] float32.
      ends: with SiLU, to about 11 bits, in phases of 2x2 cells.
      cut: how the work is shared out.
      name: what profiles call the kernel, before its channels.
      interpret: `plgpu.InterpretGPUParams()` to run without a GPU; all but the zeros outside the image is the same.

    Returns:
      [N, h, w, O], or [N, h / 2, w / 2, 4 O] if it `ends`.

    Raises:
      ValueError: for other sizes.
    """
    images, height, width, channels = x.shape
    out = kernel.shape[-1]
    if (
        images % M
        or (channels not in (16, 32) and channels % 64)
        or out not in (16, 32, 48, 64)
        or height % cut.rows
        or out % (8 * cut.parts)
        or (ends and (height % 2 or width % 2))
    ):
        raise ValueError(f"x {x.shape} and kernel {kernel.shape} are not of the sizes that the kernel takes")
    each = _for_kernels(ends, cut, f"{name}_{channels}_{out}", interpret)
    return each(x, kernel[None], bias[None])


def _for_kernels(ends: bool, cut: Cut, name: str, interpret: Any) -> Any:
    """Function of x [S N, h, w, I], kernels [S, 3, 3, I, O] and biases [S, O], which `vmap` calls with a larger S."""

    @jax.custom_batching.custom_vmap
    def function(x: jax.Array, kernels: jax.Array, biases: jax.Array) -> jax.Array:
        return _launch(x, kernels, biases, ends, cut, name, interpret)

    @function.def_vmap
    def _(size: int, mapped: Sequence[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
        full = (
            operand if has else jnp.broadcast_to(operand, (size, *operand.shape))
            for operand, has in zip(operands, mapped)
        )
        y = function(*(operand.reshape(-1, *operand.shape[2:]) for operand in full))
        return y.reshape(size, -1, *y.shape[1:]), True

    return function


@functools.partial(jax.jit, static_argnames=("ends", "cut", "name", "interpret"))
def _launch(
    x: jax.Array, kernels: jax.Array, biases: jax.Array, ends: bool, cut: Cut, name: str, interpret: Any
) -> jax.Array:
    """All kernels, each of as many of the images."""
    images, height, width, channels = x.shape
    seeds, out = biases.shape
    depth = min(channels, 64)
    # The interpreter moves a tile that begins outside of an array into it, where TMA fills in zeros.
    above = 1 if interpret is None else 0
    if interpret is not None:
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    weights = kernels[:, :, ::-1].reshape(seeds, 3, 3, channels // depth, depth, out).transpose(0, 1, 3, 2, 5, 4)
    # [(seed, dy, block, part), (dx from 2 to 0, O / parts), channel]
    weights = weights.reshape(seeds, 3, channels // depth, 3, cut.parts, out // cut.parts, depth).swapaxes(3, 4)
    weights = weights.reshape(-1, 3 * out // cut.parts, depth)
    cells = (height // 2 * (width // 2), 4 * out) if ends else (height * width, out)
    call: Any = plgpu.kernel(
        functools.partial(_program, height=height, width=width, above=above, ends=ends, cut=cut),
        out_type=jax.ShapeDtypeStruct((images, *cells), x.dtype),
        scratch_types={"smem": _scratch(cut, (weights.shape[0] // seeds, *weights.shape[1:]), out)},
        grid=(height // cut.rows * (images // M),),
        grid_names=("program",),
        num_threads=cut.rows * cut.parts,
        thread_name="warpgroup",
        # Approximate to a few float32 digits, far below bfloat16.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
        interpret=interpret,
    )
    y = call(x.reshape(images, -1, depth), weights, jnp.pad(biases, ((0, 0), (0, -out % 32))).reshape(-1))
    return y.reshape(images, height // 2, width // 2, -1) if ends else y.reshape(images, height, width, out)


def _scratch(cut: Cut, weights: tuple[int, ...], out: int) -> dict[str, Any]:
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


def _program(
    x: Any, weights: Any, bias: Any, y: Any, smem: Any, *, height: int, width: int, above: int, ends: bool, cut: Cut
) -> None:
    """64 images and a strip of rows, all columns.

    x is [S N, (row, column, block), channel] and lacks `above` rows of zeros over each image; y is written.
    """
    me, program = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("program")
    mine, part = divide(me, cut.parts)  # row and channels, of the program's
    group, strip = divide(program, height // cut.rows)
    row, images = strip * cut.rows + mine, pl.ds(group * M, M)
    taps, out = smem["weights"].shape[0], weights.shape[1] // 3  # of a kernel, output channels of this warpgroup
    blocks = taps // (3 * cut.parts)
    total = width * blocks

    def fetch(t: Any) -> None:
        """Starts the copies for column and block number t."""
        slot = divide(t, cut.stages)[1]
        for j in range(cut.rows + 2):
            place = (strip * cut.rows + j - above) * total + t
            plgpu.copy_gmem_to_smem(x.at[images, place], smem["x"].at[slot, j], smem["ready"].at[slot])

    def multiply(acc: Any, t: Any, block: int) -> None:
        """Adds what block number t has for the columns around its own."""

        @pl.when((me == 0) & (t >= cut.behind) & (t - cut.behind + cut.stages < total))
        def _() -> None:
            plgpu.barrier_wait(smem["done"].at[divide(t - cut.behind + cut.stages, cut.stages)[1]])
            fetch(t - cut.behind + cut.stages)

        slot = divide(t, cut.stages)[1]
        plgpu.barrier_wait(smem["ready"].at[slot])
        for dy in range(3):
            side_by_side = smem["weights"].at[(dy * blocks + block) * cut.parts + part]
            plgpu.wgmma(acc, smem["x"].at[slot, mine + dy], side_by_side.transpose((1, 0)))
        plgpu.wgmma_wait(0)

        @pl.when(t + cut.stages < total)
        def _() -> None:
            plgpu.barrier_arrive(smem["done"].at[slot])

    def store(sums: jax.Array, column: Any) -> None:
        sums = sums + jax.lax.broadcast_in_dim(shift, (M, out), (1,))
        if ends:
            half = 0.5 * sums
            sums = half * jnp.tanh(half) + half
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the column before
        smem["y"][me] = sums.astype(y.dtype)
        plgpu.commit_smem()
        cell, phase = row * width + column, jnp.int32(0)
        if ends:
            (cell_row, phase_row), (cell_column, phase_column) = divide(row, 2), divide(column, 2)
            cell, phase = cell_row * (width // 2) + cell_column, 2 * phase_row + phase_column
        plgpu.copy_smem_to_gmem(smem["y"].at[me], y.at[images, cell, pl.ds((phase * cut.parts + part) * out, out)])

    def step(column: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def products(acc: Any) -> jax.Array:
            for block in range(blocks):
                multiply(acc, column * blocks + block, block)
            return acc[...]

        found = pl.run_scoped(products, plgpu.ACC((M, 3 * out), jnp.float32))
        before, here = carry  # sums of output columns column - 1 and column

        @pl.when(column > 0)
        def _() -> None:
            store(before + found[:, :out], column - 1)

        return here + found[:, out : 2 * out], found[:, 2 * out :]

    @pl.when(me == 0)
    def _() -> None:
        padded, kernels = smem["bias"].shape[0], weights.shape[0] // taps
        kernel = divide(group, x.shape[0] // (M * kernels))[0]
        plgpu.copy_gmem_to_smem(weights.at[pl.ds(kernel * taps, taps)], smem["weights"], smem["common"])
        plgpu.copy_gmem_to_smem(bias.at[pl.ds(kernel * padded, padded)], smem["bias"], smem["common"])
        for t in range(cut.stages):
            fetch(jnp.int32(t))

    plgpu.barrier_wait(smem["common"])
    load: Any = plgpu.load  # of jax 0.11; that of 0.10 has other arguments
    shift = load(smem["bias"].at[pl.ds(part * out, out)], layout=plgpu.Layout.WGMMA.reduce(0))
    zeros = plgpu.layout_cast(jnp.zeros((M, out), jnp.float32), plgpu.Layout.WGMMA)
    last, _ = jax.lax.fori_loop(0, width, step, (zeros, zeros))
    store(last, jnp.int32(width - 1))
    plgpu.wait_smem_to_gmem(0)
