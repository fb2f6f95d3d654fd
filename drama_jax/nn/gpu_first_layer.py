"""Backward pass of the first layer in training as one GPU kernel: 3x3 convolution, batch normalisation, SiLU.

With y = conv3x3(x, kernel), u = y scale + shift, and inner the gradient of silu(u) times silu'(u), the gradient by y is

    inner scale + y slope + level

per channel, where slope and level follow from the sums of inner and of inner y over all cells (`nn.batch_norm`). The
input of the first layer is frames, which need no gradient: only the kernel's gradient reads the one by y. It is linear
in it, so that those by inner and by y, with sums over the neighbours of cells for the level, give it as soon as the
sums are known. One pass gathers all of it; nothing of the size of y is written, and y is read once instead of twice.

Four cells in a row, of 16 channels each, are 64 contiguous numbers, the last 16 of which count as zero: three products
of depth 64 per row and operand replace nine of depth 16. Programs share the images; their sums are added afterwards in
a fixed order, so that the result is reproducible. Under `jax.vmap` each example gets programs of its own, which read
their part of the stacked arrays: examples one by one, as for XLA's convolutions, would have to be copied out first.
Notation as in `nn.gpu_convolution`, whose `available` says where the kernel runs; `nn.gpu_first_layer_forward` is the
way there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn.gpu_cells import FULL, POSITIONS, divide, dot, silu_slope

CHANNELS = 16
"""Channels per cell that the kernel takes."""
SPAN = 4 * CHANNELS
OUT = 64
"""Output channels that a program takes."""
WARPS = 8
STAGES = 3
PROGRAMS = FULL // 2
"""One program per multiprocessor: each has 220 registers a thread."""


def serves(x: jax.Array, out_channels: int) -> bool:
    """Whether `sums` takes an input [N, h, w, I] and is faster than XLA: frames of 64 pixels, presets xs and s.

    Measured for 64 output channels (xs); of 128 (s) each half is the same work.
    """
    _, height, width, channels = x.shape
    size = height == 32 and width == 32 and channels <= CHANNELS
    return size and x.dtype == jnp.bfloat16 and out_channels in (OUT, 2 * OUT)


def padded(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zeros up to `CHANNELS` input channels, for x [.., I] and the kernel [3, 3, I, O]."""
    missing = (0, CHANNELS - x.shape[-1])
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + (missing,)), jnp.pad(kernel, ((0, 0), (0, 0), missing, (0, 0)))


def check(function: str, shape: tuple[int, ...], out: int) -> None:
    """Raises ValueError for an input [N, h, w, I] or a number of outputs that the kernels are not made for."""
    _, height, width, channels = shape
    if channels != CHANNELS or POSITIONS % width or (out not in (16, 32) and out % OUT):
        raise ValueError(
            f"{function} needs I 16, w a divisor of 64, and O 16, 32 or a multiple of 64; got "
            f"[N, {height}, {width}, {channels}] and O {out}"
        )


def sums(
    x: jax.Array,
    y: jax.Array,
    gradient: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums over all cells from which the gradients of the layer follow.

    Args:
      x: the convolution's input [N, h, w, 16], w a divisor of 64.
      y: its output [N, h, w, O]; O is 16, 32 or a multiple of 64.
      gradient: of silu(y scale + shift), [N, h, w, O].
      scale: [C] float32, of O / C phases.
      shift: [C] float32.
      interpret: run without a GPU, slowly.

    Returns:
      All float32: gradients of conv3x3(x, kernel) by the kernel, where the gradient by the output is inner or y, both
      [3, 3, 16, O]; sums of inner and of inner y, [2, O]; and sums of the inputs at the nine taps, [3, 3, 16].

    Raises:
      ValueError: if the shape is none of these.
    """
    check("gpu_first_layer.sums", x.shape, y.shape[-1])
    images, _, width, channels = x.shape
    out = y.shape[-1]
    block = min(out, OUT)
    groups = pl.cdiv(images, POSITIONS // width)
    programs = min(max(PROGRAMS // (out // block), 1), groups)
    products, totals = pl.pallas_call(
        functools.partial(_program, shape=y.shape, block=block, groups=pl.cdiv(groups, programs), interpret=interpret),
        grid=(programs, out // block),
        out_shape=[
            jax.ShapeDtypeStruct((programs * 6 * SPAN * out,), jnp.float32),
            jax.ShapeDtypeStruct((programs * 2 * out,), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=f"first_layer_gradient_{channels}_{out}",
    )(x.reshape(-1), y.reshape(-1), gradient.reshape(-1), scale, shift)
    by_inner, by_y = products.reshape(programs, 2, 3, 4, CHANNELS, out).sum(axis=0)[:, :, :3]
    return by_inner, by_y, totals.reshape(programs, 2, out).sum(axis=0), _sums_at_taps(x)


def _program(
    x_ref: Any,
    y_ref: Any,
    gradient_ref: Any,
    scale_ref: Any,
    shift_ref: Any,
    products_ref: Any,
    totals_ref: Any,
    *,
    shape: tuple[int, ...],
    block: int,
    groups: int,
    interpret: bool,
) -> None:
    """Some groups of images, from the top row to the bottom, and `block` output channels."""
    images, height, width, out = shape
    program = pl.program_id(0)
    channel = pl.program_id(1) * block + jnp.arange(block)
    entry = jnp.arange(SPAN)
    image_of_group, column = divide(jnp.arange(POSITIONS), width)
    _, feature = divide(channel, scale_ref.shape[0])
    scale, shift = pltriton.load(scale_ref.at[feature])[None, :], pltriton.load(shift_ref.at[feature])[None, :]

    def step(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        group, row = divide(k, height)
        image = (program * groups + group) * (POSITIONS // width) + image_of_group
        cell = (image * height + row) * width + column
        there = (image < images)[:, None]
        index, mask = cell[:, None] * out + channel[None, :], jnp.broadcast_to(there, (POSITIONS, block))
        y = pltriton.load(y_ref.at[index], mask=mask, other=0.0)
        gradient = pltriton.load(gradient_ref.at[index], mask=mask, other=0.0)
        wide = y.astype(jnp.float32)
        inner = gradient.astype(jnp.float32) * silu_slope(wide * scale + shift, interpret)
        rounded = inner.astype(y.dtype)
        beside = there & in_row(column, entry, width)
        by_inner, by_y = list(carry[:3]), list(carry[3:6])
        for dy in range(3):
            above = row + dy - 1
            start = (cell + (dy - 1) * width - 1) * CHANNELS
            inside = beside & (above >= 0) & (above < height)
            tile = pltriton.load(x_ref.at[start[:, None] + entry[None, :]], mask=inside, other=0.0).T
            by_inner[dy] = by_inner[dy] + dot(tile, rounded)
            by_y[dy] = by_y[dy] + dot(tile, y)
        return *by_inner, *by_y, carry[6] + inner, carry[7] + inner * wide

    product, total = jnp.zeros((SPAN, block), jnp.float32), jnp.zeros((POSITIONS, block), jnp.float32)
    *products, inner, weighted = jax.lax.fori_loop(0, groups * height, step, (product,) * 6 + (total,) * 2)
    for i, product in enumerate(products):
        line = ((program * 6 + i) * SPAN + entry) * out
        pltriton.store(products_ref.at[line[:, None] + channel[None, :]], product)
    for i, total in enumerate((inner, weighted)):
        pltriton.store(totals_ref.at[(program * 2 + i) * out + channel], jnp.sum(total, axis=0))


def in_row(column: jax.Array, entry: jax.Array, width: int) -> jax.Array:
    """Which entries [SPAN] of the four cells that begin left of `column` [positions] count: [positions, SPAN] bool.

    Those of the three cells around a column, as far as the row has them; the fourth is left out.
    """
    offset = divide(entry, CHANNELS)[0] - 1  # of the entry's cell
    neighbour = column[:, None] + offset[None, :]
    return (neighbour >= 0) & (neighbour < width) & (offset < 2)[None, :]


def _sums_at_taps(x: jax.Array) -> jax.Array:
    """Sum over cells of their neighbour at each of the nine taps, zero outside: [N, h, w, I] -> [3, 3, I] float32."""
    _, height, width, _ = x.shape
    # The barriers keep it one pass over x as it is stored, behind which everything is small.
    total = jax.lax.optimization_barrier(x).astype(jnp.float32).sum(axis=0)
    total = jax.lax.optimization_barrier(total)
    tap = jnp.arange(3)[:, None] - 1
    rows, columns = (
        ((jnp.arange(size) - tap >= 0) & (jnp.arange(size) - tap < size)).astype(jnp.float32)
        for size in (height, width)
    )  # [3, h] and [3, w]: whether a cell is some cell's neighbour at that tap
    lines = jnp.sum(rows[:, :, None, None] * total, axis=1)
    return jnp.sum(columns[None, :, :, None] * lines[:, None], axis=2)
