"""The convolution of the first layer in training, and the sums that batch normalisation needs of it, as one GPU kernel.

XLA would read all of the result once more for its mean and variance. Here each program adds up what it writes; the
programs' sums are added afterwards in a fixed order, so that the result is reproducible.

Four cells in a row, of 16 channels each, are 64 contiguous numbers: one product of that depth, whose last quarter is
zeros, serves three taps. A program walks down the rows of as many images as make 64 cells in a row; each tile is loaded
once and enters three rows of results, which move along. Notation as in `nn.gpu_convolution`, whose `available` says
where the kernel runs; `nn.gpu_first_layer` is the way back.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn.gpu_cells import POSITIONS, divide, dot
from drama_jax.nn.gpu_first_layer import CHANNELS, OUT, SPAN, check, in_row

WARPS = 4
STAGES = 4
"""The fastest of seven ways to cut it (benchmarks/README.md); no effect on results."""


def conv3x3_and_sums(x: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """y = conv3x3(x, kernel), and the sums of y and of its square over all cells.

    Args:
      x: [N, h, w, 16], w a divisor of 64.
      kernel: [3, 3, 16, O] of the dtype of `x`; O is 16, 32 or a multiple of 64.
      interpret: run without a GPU, slowly.

    Returns:
      y [N, h, w, O], dtype of `x`; sums [2, O] float32, of y as it is rounded to that dtype.

    Raises:
      ValueError: if the shape is none of these.
    """
    check("gpu_first_layer_forward.conv3x3_and_sums", x.shape, kernel.shape[-1])
    images, height, width, _ = x.shape
    out = kernel.shape[-1]
    block = min(out, OUT)
    groups = pl.cdiv(images, POSITIONS // width)
    weights = jnp.pad(kernel, ((0, 0), (0, 1), (0, 0), (0, 0))).reshape(3 * SPAN, out)
    y, totals = pl.pallas_call(
        functools.partial(_program, shape=(*x.shape[:3], out), block=block),
        grid=(groups, out // block),
        out_shape=[
            jax.ShapeDtypeStruct((images * height * width * out,), x.dtype),
            jax.ShapeDtypeStruct((groups * 2 * out,), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=f"first_layer_{CHANNELS}_{out}",
    )(x.reshape(-1), weights)
    return y.reshape(images, height, width, out), totals.reshape(groups, 2, out).sum(axis=0)


def _program(x_ref: Any, weight_ref: Any, y_ref: Any, totals_ref: Any, *, shape: tuple[int, ...], block: int) -> None:
    """A group of images, from the top row to the bottom, and `block` output channels."""
    images, height, width, out = shape
    group, first = pl.program_id(0), pl.program_id(1) * block
    channel, entry = first + jnp.arange(block), jnp.arange(SPAN)
    image_of_group, column = divide(jnp.arange(POSITIONS), width)
    image = group * (POSITIONS // width) + image_of_group
    there = (image < images)[:, None]
    beside = there & in_row(column, entry, width)
    taps = [weight_ref[pl.ds(dy * SPAN, SPAN), pl.ds(first, block)] for dy in range(3)]

    def step(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Adds row k - 1 to the results of three rows; the first of them, of row k - 2, is then complete."""
        above, here, total, square = carry
        row = k - 1
        cell = (image * height + row) * width + column
        inside = beside & (row >= 0) & (row < height)
        tile = pltriton.load(x_ref.at[((cell - 1) * CHANNELS)[:, None] + entry[None, :]], mask=inside, other=0.0)
        y = (above + dot(tile, taps[2])).astype(tile.dtype)
        here, below = here + dot(tile, taps[1]), dot(tile, taps[0])
        mask = jnp.broadcast_to(there & (row >= 1), y.shape)
        pltriton.store(y_ref.at[((cell - width) * out)[:, None] + channel[None, :]], y, mask=mask)
        wide = jnp.where(mask, y.astype(jnp.float32), 0.0)
        return here, below, total + wide, square + wide * wide

    zeros = jnp.zeros((POSITIONS, block), jnp.float32)
    _, _, *totals = jax.lax.fori_loop(0, height + 2, step, (zeros,) * 4)
    for i, total in enumerate(totals):
        pltriton.store(totals_ref.at[(group * 2 + i) * out + channel], jnp.sum(total, axis=0))
