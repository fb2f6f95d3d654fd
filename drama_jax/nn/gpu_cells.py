"""What the convolution kernels share: which cells a program serves, how it is launched, small arithmetic.

Notation as in `nn.gpu_convolution`. Lowered through the Triton backend of Pallas, deprecated in JAX since 0.11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

POSITIONS = 64
WARPS = 4
STAGES = 3
FULL = 264
"""Programs that fill the device: two per multiprocessor of an H100."""


class Cells:
    """Where the cells of a program are; everything is static but the arguments of the methods."""

    def __init__(
        self, shape: tuple[int, ...], out_channels: int, positions: int, to_phases: bool, from_phases: bool = False
    ) -> None:
        self.images, self.height, self.width, self.channels = shape
        self.out_channels, self.positions = out_channels, positions
        self.to_phases, self.from_phases = to_phases, from_phases

    def place(self, group: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image and column [positions] of the program's cells."""
        image, column = divide(jnp.arange(self.positions), self.width)
        return group * (self.positions // self.width) + image, column

    def inside(self, image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        """Whether there is such a cell [positions]."""
        return (image < self.images) & (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)

    def number(self, image: jax.Array, row: jax.Array, column: jax.Array, phases: bool) -> jax.Array:
        """Which of all cells these are in memory, with their phases or row by row."""
        if not phases:
            return (image * self.height + row) * self.width + column
        cell, phase = in_phases(row, column, self.width)
        return (image * (self.height // 2 * (self.width // 2)) + cell) * 4 + phase

    def store(
        self, ref: Any, y: jax.Array, image: jax.Array, row: jax.Array, column: jax.Array, valid: jax.Array | bool
    ) -> None:
        """Writes y [positions, padded O] to the cells of one row, in the layout asked for."""
        start = self.number(image, row, column, self.to_phases) * self.out_channels
        channel = jnp.arange(y.shape[-1])
        mask = ((image < self.images) & valid)[:, None] & (channel < self.out_channels)[None, :]
        pltriton.store(ref.at[start[:, None] + channel[None, :]], y.astype(ref.dtype), mask=mask)


def launch(
    program: Callable[..., None],
    grid: tuple[int, ...],
    out_shape: jax.ShapeDtypeStruct,
    operands: tuple[jax.Array, ...],
    *,
    stages: int = STAGES,
    name: str,
    interpret: bool,
) -> jax.Array:
    """A kernel over flat operands, the first of them x; the output is flat, too."""
    x, *others = operands
    return pl.pallas_call(
        program,
        grid=grid,
        out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(num_warps=WARPS, num_stages=stages),
        interpret=interpret,
        name=name,
    )(x.reshape(-1), *others)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product, summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def silu(x: jax.Array, interpret: bool) -> jax.Array:
    """SiLU, to about 11 bits on a GPU."""
    half = 0.5 * x
    return half * _tanh(half, interpret) + half


def silu_slope(x: jax.Array, interpret: bool) -> jax.Array:
    """The derivative of SiLU, to about 11 bits on a GPU."""
    gate = 0.5 * _tanh(0.5 * x, interpret) + 0.5
    return gate * (1 + x * (1 - gate))


def _tanh(x: jax.Array, interpret: bool) -> jax.Array:
    # One instruction instead of an exponential and a division; the interpreter does not know it.
    return jnp.tanh(x) if interpret else pltriton.approx_tanh(x)


def divide(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of non-negative numbers; `//` and `%` would handle signs, which does not lower."""
    quotient = jax.lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor


def in_phases(row: jax.Array, column: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Cell of a pixel, counted row by row, and its phase; numbers are not negative, the width is that in pixels."""
    (cell_row, phase_row), (cell_column, phase_column) = divide(row, 2), divide(column, 2)
    return cell_row * (width // 2) + cell_column, 2 * phase_row + phase_column


def pixel_shape(shape: tuple[int, ...], phases: bool) -> tuple[int, ...]:
    """[N, h, w, C] of an array of that shape, or of one in phases, [N, h / 2, w / 2, 4 C]."""
    images, height, width, channels = shape
    return (images, 2 * height, 2 * width, channels // 4) if phases else shape
