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

from drama_jax.nn.gpu_cells import FULL, POSITIONS, Cells, divide, dot, launch, pixel_shape


def serves(x: jax.Array, out_channels: int, *, from_phases: bool = False) -> bool:
    """Whether `kernel_gradient` takes an input [N, h, w, I], or its phases, and is faster than XLA with it."""
    _, _, width, channels = pixel_shape(x.shape, from_phases)
    shape = channels in (16, 32, 64) and out_channels in (16, 32, 64) and POSITIONS % width == 0 and width >= 16
    return shape and x.dtype == jnp.bfloat16 and channels * out_channels <= 2048


def kernel_gradient(
    x: jax.Array,
    gradient: jax.Array,
    *,
    from_phases: bool = False,
    to_phases: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Gradient of a 3x3 convolution by its kernel.

    Args:
      x: the input [N, h, w, I], or [N, h/2, w/2, 4 I] if `from_phases`; I is 16, 32 or 64, w a divisor of 64.
      gradient: of the output [N, h, w, O], or [N, h/2, w/2, 4 O] if `to_phases`; O is 16, 32 or 64.
      from_phases: `x` is in phase layout.
      to_phases: likewise `gradient`.
      interpret: run without a GPU, slowly.

    Returns:
      [3, 3, I, O] float32.
    """
    shape, out_channels = pixel_shape(x.shape, from_phases), pixel_shape(gradient.shape, to_phases)[-1]
    images, _, width, channels = shape
    groups = pl.cdiv(images, POSITIONS // width)
    programs = min(FULL, groups)
    cells = Cells(shape, out_channels, POSITIONS, to_phases, from_phases)
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

        def load(ref: Any, phases: bool, row: jax.Array, column: jax.Array, entry: jax.Array) -> jax.Array:
            inside = cells.inside(image, row, column)
            mask = jnp.broadcast_to(inside[:, None], (column.shape[0], entry.shape[0]))
            index = (cells.number(image, row, column, phases) * entry.shape[0])[:, None] + entry[None, :]
            return pltriton.load(ref.at[index], mask=mask, other=0.0)

        tiles = [load(x_ref, cells.from_phases, row, column + dx - 1, channel) for dx in range(3)]
        sums_ = list(sums)
        for dy in range(3):
            tile = load(gradient_ref, cells.to_phases, row + 1 - dy, column, out_channel)
            for dx in range(3):
                sums_[3 * dy + dx] = sums_[3 * dy + dx] + dot(tiles[dx].T, tile)
        return tuple(sums_)

    zeros = jnp.zeros((cells.channels, cells.out_channels), jnp.float32)
    sums = jax.lax.fori_loop(0, groups * cells.height, step, (zeros,) * 9)
    for tap, total in enumerate(sums):
        start = ((program * 9 + tap) * cells.channels + channel) * cells.out_channels
        pltriton.store(out_ref.at[start[:, None] + out_channel[None, :]], total)
