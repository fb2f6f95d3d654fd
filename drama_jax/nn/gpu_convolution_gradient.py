"""The gradient of a 3x3 convolution by its kernel, as a GPU kernel, where it beats XLA's.

It walks down the rows with nine accumulators, one per tap; programs share the images, and their sums are added
afterwards in a fixed order, so that the result is reproducible. Notation as in `nn.gpu_convolution`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn.gpu_cells import FULL, POSITIONS, Cells, divide, dot, launch


def serves(x: jax.Array, out_channels: int) -> bool:
    """Whether `kernel_gradient` takes an input [N, h, w, I], and is faster than XLA with it."""
    _, _, width, channels = x.shape
    shape = channels in (16, 32, 64) and out_channels in (16, 32, 64) and POSITIONS % width == 0 and width >= 16
    return shape and x.dtype == jnp.bfloat16 and channels * out_channels <= 2048


def kernel_gradient(x: jax.Array, gradient: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Gradient of a 3x3 convolution by its kernel.

    Args:
      x: the input [N, h, w, I]; I is 16, 32 or 64, w a divisor of 64.
      gradient: of the output [N, h, w, O]; O is 16, 32 or 64.
      interpret: run without a GPU, slowly.

    Returns:
      [3, 3, I, O] float32.
    """
    images, _, width, channels = x.shape
    out_channels = gradient.shape[-1]
    groups = pl.cdiv(images, POSITIONS // width)
    programs = min(FULL, groups)
    cells = Cells(x.shape, out_channels, POSITIONS, False)
    sums = launch(
        functools.partial(_gradient_program, cells=cells, groups=pl.cdiv(groups, programs)),
        (programs,),
        jax.ShapeDtypeStruct((programs * 9 * channels * out_channels,), jnp.float32),
        (x, gradient.reshape(-1)),
        name=f"conv3x3_gradient_{channels}_{out_channels}",
        interpret=interpret,
    )
    return sums.reshape(programs, 3, 3, channels, out_channels).sum(axis=0)


def _gradient_program(x_ref: Any, gradient_ref: Any, out_ref: Any, *, cells: Cells, groups: int) -> None:
    program = pl.program_id(0)
    channel, out_channel = jnp.arange(cells.channels), jnp.arange(cells.out_channels)

    def step(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, row = divide(k, cells.height)
        image, column = cells.place(program * groups + group)
        cell = (image * cells.height + row) * cells.width + column

        def load(ref: Any, offset: int, entry: jax.Array, inside: jax.Array) -> jax.Array:
            mask = jnp.broadcast_to(inside[:, None], (column.shape[0], entry.shape[0]))
            index = ((cell + offset) * entry.shape[0])[:, None] + entry[None, :]
            return pltriton.load(ref.at[index], mask=mask, other=0.0)

        tiles = [load(x_ref, dx - 1, channel, cells.inside(image, row, column + dx - 1)) for dx in range(3)]
        sums_ = list(sums)
        for dy in range(3):
            inside = cells.inside(image, row + 1 - dy, column)
            tile = load(gradient_ref, (1 - dy) * cells.width, out_channel, inside)
            for dx in range(3):
                sums_[3 * dy + dx] = sums_[3 * dy + dx] + dot(tiles[dx].T, tile)
        return tuple(sums_)

    zeros = jnp.zeros((cells.channels, cells.out_channels), jnp.float32)
    sums = jax.lax.fori_loop(0, groups * cells.height, step, (zeros,) * 9)
    for tap, total in enumerate(sums):
        start = ((program * 9 + tap) * cells.channels + channel) * cells.out_channels
        pltriton.store(out_ref.at[start[:, None] + out_channel[None, :]], total)
