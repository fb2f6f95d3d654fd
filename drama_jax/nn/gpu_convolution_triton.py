"""3x3 convolutions as GPU kernels through the Triton backend of Pallas, with a fused end.

Both kernels are implicit matrix products that read each input fewer than the nine times a 3x3 stencil asks for:

* `_walk` keeps the whole kernel in shared memory and walks down the rows of a few images. Each input row is loaded
  once per column offset and enters three output rows, whose accumulators move along. For few channels.
* `_block` holds `ROWS_HELD` output rows at once and loops over column offsets and channels. For more channels. Of a few
  images, as in acting, it holds a single row of fewer cells, so that more multiprocessors have something to do.

Notation as in `nn.gpu_convolution`. A program serves `positions` cells: one row of positions / w images.
That backend is deprecated in JAX since 0.11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn import gpu_cells
from drama_jax.nn.gpu_cells import FULL, POSITIONS, STAGES, Cells, divide, dot, launch

ROWS_HELD = 4
DEPTH = 32
"""Channels that `_block` takes at a time."""
FEW, FEW_POSITIONS, FEW_DEPTH = FULL // 2, 16, 64
"""Fewer programs leave multiprocessors idle; `_block` then takes so many cells and channels at a time."""


@functools.partial(jax.jit, static_argnames=("silu", "to_phases", "interpret", "name"))
def conv3x3(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    silu: bool = False,
    to_phases: bool = False,
    interpret: bool = False,
    name: str = "conv3x3",
) -> jax.Array:
    """`nn.gpu_convolution.conv3x3`, with its arguments, by Triton; `interpret` runs it without a GPU, slowly.

    The bias is needed here, float32.

    Raises:
      ValueError: if the shape is none of those.
    """
    images, height, width, channels = x.shape
    out_channels = kernel.shape[-1]
    held = 1 if channels <= 64 else ROWS_HELD
    if (channels % 16 if held > 1 else channels not in (16, 32, 64)) or POSITIONS % width or height % held:
        raise ValueError(
            "gpu_convolution needs I 16, 32, 64 or a larger multiple of 16, w a divisor of 64, and h a "
            f"multiple of 4 if I > 64; got [N, {height}, {width}, {channels}]"
        )

    def end(y: jax.Array) -> jax.Array:
        return gpu_cells.silu(y, interpret) if silu else y

    run = _walk if channels <= 64 else _block
    y = run(x, kernel, bias, end, to_phases, interpret, f"{name}_{channels}_{out_channels}")
    if to_phases:
        return y.reshape(images, height // 2, width // 2, 4 * out_channels)
    return y.reshape(images, height, width, out_channels)


End = Callable[[jax.Array], jax.Array]


def _walk(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, end: End, to_phases: bool, interpret: bool, name: str
) -> jax.Array:
    """All images, from the top row to the bottom; flat output."""
    images, height, width, channels = x.shape
    positions = max(32 if channels == 16 else POSITIONS, width)
    groups = pl.cdiv(images, positions // width)
    # With few images the rows are shared out, at the price of two more rows per strip.
    strips = next((s for s in (1, 2, 4, 8, 16) if groups * s >= FULL or height % (2 * s)), 16)
    weights, bias = _pad_out(kernel.reshape(-1, kernel.shape[-1]), bias)
    cells = Cells(x.shape, kernel.shape[-1], positions, to_phases)
    return launch(
        functools.partial(_walk_program, cells=cells, strips=strips, end=end),
        (groups * strips,),
        jax.ShapeDtypeStruct((x.size // channels * kernel.shape[-1],), x.dtype),
        (x, weights, bias),
        # Shifted rows of 64 channels are found in the L1 cache; loads ahead of time into shared memory pass it by.
        stages=1 if channels == 64 else STAGES,
        name=name,
        interpret=interpret,
    )


def _walk_program(
    x_ref: Any, weight_ref: Any, bias_ref: Any, out_ref: Any, *, cells: Cells, strips: int, end: End
) -> None:
    channels, padded = cells.channels, weight_ref.shape[-1]
    group, strip = divide(pl.program_id(0), strips)
    rows = cells.height // strips
    top = strip * rows
    image, column = cells.place(group)
    channel = jnp.arange(channels)
    taps = [[weight_ref[pl.ds((3 * dy + dx) * channels, channels), :] for dx in range(3)] for dy in range(3)]

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        above, here = carry  # sums of output rows row - 1 and row
        row = top - 1 + k
        below = jnp.zeros_like(here)
        start = ((image * cells.height + row) * cells.width + column) * channels
        for dx in range(3):
            inside = cells.inside(image, row, column + dx - 1)
            tile = pltriton.load(
                x_ref.at[(start + (dx - 1) * channels)[:, None] + channel[None, :]],
                mask=jnp.broadcast_to(inside[:, None], (column.shape[0], channels)),
                other=0.0,
            )
            above = above + dot(tile, taps[2][dx])
            here = here + dot(tile, taps[1][dx])
            below = below + dot(tile, taps[0][dx])
        y = end(above + bias_ref[:][None, :])
        cells.store(out_ref, y, image, jnp.maximum(row - 1, 0), column, row - 1 >= top)
        return here, below

    zeros = jnp.zeros((column.shape[0], padded), jnp.float32)
    jax.lax.fori_loop(0, rows + 2, step, (zeros, zeros))


def _block(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, end: End, to_phases: bool, interpret: bool, name: str
) -> jax.Array:
    """All images, some rows at a time; flat output."""
    images, height, width, channels = x.shape
    held, positions, depth = ROWS_HELD, POSITIONS, DEPTH
    if pl.cdiv(images, positions // width) * (height // held) < FEW:
        held, positions, depth = 1, max(FEW_POSITIONS, width), FEW_DEPTH
    depth = next(size for size in (depth, DEPTH, 16) if channels % size == 0)
    weights, bias = _pad_out(kernel.reshape(-1, kernel.shape[-1]), bias)
    cells = Cells(x.shape, kernel.shape[-1], positions, to_phases)
    return launch(
        functools.partial(_block_program, cells=cells, held=held, depth=depth, end=end),
        (pl.cdiv(images, positions // width) * (height // held),),
        jax.ShapeDtypeStruct((x.size // channels * kernel.shape[-1],), x.dtype),
        (x, weights, bias),
        name=name,
        interpret=interpret,
    )


def _block_program(
    x_ref: Any, weight_ref: Any, bias_ref: Any, out_ref: Any, *, cells: Cells, held: int, depth: int, end: End
) -> None:
    channels, padded = cells.channels, weight_ref.shape[-1]
    group, strip = divide(pl.program_id(0), cells.height // held)
    top = strip * held
    image, column = cells.place(group)
    entry = jnp.arange(depth)

    def step(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, block = divide(k, channels // depth)
        taps = [weight_ref[pl.ds((3 * dy + dx) * channels + block * depth, depth), :] for dy in range(3)]
        start = ((image * cells.height + top) * cells.width + column + dx - 1) * channels + block * depth
        rows = list(sums)
        for j in range(held + 2):
            inside = cells.inside(image, top + j - 1, column + dx - 1)
            tile = pltriton.load(
                x_ref.at[(start + (j - 1) * cells.width * channels)[:, None] + entry[None, :]],
                mask=jnp.broadcast_to(inside[:, None], (column.shape[0], depth)),
                other=0.0,
            )
            for dy in range(3):
                if 0 <= j - dy < held:
                    rows[j - dy] = rows[j - dy] + dot(tile, taps[dy])
        return tuple(rows)

    zeros = jnp.zeros((column.shape[0], padded), jnp.float32)
    sums = jax.lax.fori_loop(0, 3 * (channels // depth), step, (zeros,) * held)
    for j, total in enumerate(sums):
        cells.store(out_ref, end(total + bias_ref[:][None, :]), image, top + j, column, True)


def _pad_out(weights: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output channels to a power of two, at least 16: [.., O] and [O]."""
    missing = max(16, pl.next_power_of_2(bias.shape[0])) - bias.shape[0]
    return jnp.pad(weights, ((0, 0), (0, missing))), jnp.pad(bias, (0, missing))
