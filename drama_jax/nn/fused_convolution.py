"""SiLU(3x3 convolution + bias) as one GPU kernel, for the encoder in evaluation mode.

In evaluation mode batch normalisation is folded into kernel and bias, so each encoder layer is a convolution with an
elementwise end. XLA runs the convolution in cuDNN and the rest as separate passes over the largest arrays of the whole
update. Here one Pallas kernel does both and writes its output in the layout that the next layer reads.

The convolution is an implicit matrix product: a program computes `ROWS` positions times all output channels, and walks
over the three rows of the stencil; in each, the three neighbouring cells are 3 * I consecutive numbers, taken `DEPTH`
at a time. Notation: N images, h x w cells, I and O channels.

Lowered through the Triton backend of Pallas, deprecated in JAX since 0.11; all Pallas names of `nn` are in this file.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

ROWS = 128
"""Positions per program."""
DEPTH = 64
"""Length of one step of the matrix product."""
WARPS = 4
STAGES = 3


def available(x: jax.Array) -> bool:
    """Whether the kernel serves this input: bfloat16 on a GPU."""
    return jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16


def conv3x3_silu(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    to_phases: bool,
    rows: int = ROWS,
    warps: int = WARPS,
    stages: int = STAGES,
    interpret: bool = False,
) -> jax.Array:
    """SiLU of a 3x3 convolution with zero padding.

    Args:
      x: [N, h, w, I], I a multiple of 16.
      kernel: [3, 3, I, O] of the dtype of `x`.
      bias: [O], any float dtype.
      to_phases: write pixels as phases of 2x2 cells (`nn.space_to_depth` of the result).
      rows, warps, stages: tiling, by measurement (`benchmarks/autoencoder.py`).
      interpret: run without a GPU, slowly.

    Returns:
      [N, h, w, O], or [N, h/2, w/2, 4 O] if `to_phases`, in the dtype of `x`.

    Raises:
      ValueError: if I is not a multiple of 16.
    """
    images, height, width, channels = x.shape
    out_channels = kernel.shape[-1]
    if channels % 16:
        raise ValueError(f"conv3x3_silu needs input channels in multiples of 16, got {channels}")
    blocks = pl.cdiv(3 * channels, DEPTH)
    padded = pl.next_power_of_2(out_channels)
    weights = kernel.reshape(3, 3 * channels, out_channels)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * DEPTH - 3 * channels), (0, padded - out_channels)))
    total = images * height * width
    body = functools.partial(
        _program,
        shape=(total, height, width, channels, out_channels),
        rows=rows,
        blocks=blocks,
        to_phases=to_phases,
    )
    y = pl.pallas_call(
        body,
        grid=(pl.cdiv(total, rows),),
        out_shape=jax.ShapeDtypeStruct((total * out_channels,), x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"conv3x3_silu_{channels}_{out_channels}",
    )(x.reshape(-1), weights.reshape(-1, padded), jnp.pad(bias, (0, padded - out_channels)))
    if to_phases:
        return y.reshape(images, height // 2, width // 2, 4 * out_channels)
    return y.reshape(images, height, width, out_channels)


def _program(
    x_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    *,
    shape: tuple[int, int, int, int, int],
    rows: int,
    blocks: int,
    to_phases: bool,
) -> None:
    """One tile of `rows` positions; x and out are flat, weights are [3 * blocks * DEPTH, padded O]."""
    total, height, width, channels, out_channels = shape
    position = pl.program_id(0) * rows + jnp.arange(rows)
    line, column = _divmod(position, width)
    image, row = _divmod(line, height)

    def step(k: jax.Array, accumulator: jax.Array) -> jax.Array:
        stencil_row, block = _divmod(k, blocks)
        offset = stencil_row - 1
        entry = block * DEPTH + jnp.arange(DEPTH)
        inside = (row + offset >= 0) & (row + offset < height) & (position < total)
        if channels % DEPTH == 0:  # the whole block lies in one neighbour: one test per position, not per number
            neighbour = column + _divmod(block, channels // DEPTH)[0] - 1
            inside = inside & (neighbour >= 0) & (neighbour < width)
            mask = jnp.broadcast_to(inside[:, None], (rows, DEPTH))
        else:
            neighbours = column[:, None] + _divmod(entry, channels)[0][None, :] - 1
            mask = inside[:, None] & (neighbours >= 0) & (neighbours < width) & (entry < 3 * channels)[None, :]
        index = ((position + offset * width - 1) * channels)[:, None] + entry[None, :]
        tile = pltriton.load(x_ref.at[index], mask=mask, other=0.0)
        weights = weight_ref[pl.ds(k * DEPTH, DEPTH), :]
        return accumulator + jnp.dot(tile, weights, preferred_element_type=jnp.float32)

    padded = weight_ref.shape[-1]
    y = jax.lax.fori_loop(0, 3 * blocks, step, jnp.zeros((rows, padded), jnp.float32))
    y = y + bias_ref[:].astype(jnp.float32)[None, :]
    y = y * jax.nn.sigmoid(y)

    if to_phases:
        (cell_row, phase_row), (cell_column, phase_column) = _divmod(row, 2), _divmod(column, 2)
        cell = (image * (height // 2) + cell_row) * (width // 2) + cell_column
        start = (cell * 4 + phase_row * 2 + phase_column) * out_channels
    else:
        start = position * out_channels
    channel = jnp.arange(padded)
    mask = (position < total)[:, None] & (channel < out_channels)[None, :]
    pltriton.store(out_ref.at[start[:, None] + channel[None, :]], y.astype(out_ref.dtype), mask=mask)


def _divmod(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of non-negative numbers; `//` and `%` would handle signs, which does not lower."""
    quotient = jax.lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor
