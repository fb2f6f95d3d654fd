"""A convolution of 16 channels and the batch normalisation beside it, in two passes that both compute the convolution.

    python -m benchmarks.conv_norm             both sides, every way to cut the kernels, at the sizes of preset xs
    python -m benchmarks.conv_norm --check     only the errors

From 16 to 64 channels a convolution takes less time than its result takes to be written and read again. `forward` is
the first layer of the encoder, whose statistics need all of its result: the first pass keeps the sums alone, the second
normalises, applies SiLU and writes. `backward` goes from the decoder's last convolution through the normalisation and
SiLU in front of it, as `nn.batch_norm` does (its gradient's formula is there): the first pass keeps the sums over the
gradient that the convolution hands down, the second applies them. `now` is what the package does. Errors are largest
differences over the largest value, from the package's in float32; a row, a process (`benchmarks.processes`). Needs a
Hopper GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from benchmarks import common, floors, processes
from drama_jax import nn
from drama_jax.nn.batch_norm import normalise_silu
from drama_jax.nn.gpu_cells import POSITIONS, divide, dot, silu, silu_slope
from drama_jax.nn.gpu_first_layer import CHANNELS, OUT, SPAN

PHASES = 4
EPSILON = 1e-5
FRAMES, SIDE = 2048, 32


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a pass is launched."""

    warps: int
    stages: int


CUTS = {f"warps_{warps}_stages_{stages}": Cut(warps, stages) for warps in (4, 8) for stages in (1, 2, 3)}
Emit = Callable[[jax.Array, jax.Array | None, list[jax.Array], bool], Any]
"""(results of the convolution [cells, 64] float32, y there, vectors [1, 64], interpret) -> what a pass makes of it."""


def sums(result: jax.Array, y: jax.Array | None, vectors: list[jax.Array], interpret: bool) -> Any:
    """For the mean and the variance."""
    return result, result * result


def activation(result: jax.Array, y: jax.Array | None, vectors: list[jax.Array], interpret: bool) -> Any:
    """SiLU of the normalised result; vectors: factor and term."""
    return silu(result * vectors[0] + vectors[1], interpret)


def gradient_sums(result: jax.Array, y: jax.Array | None, vectors: list[jax.Array], interpret: bool) -> Any:
    """For the gradients by beta and gamma; vectors: factor and term of the normalisation, result by its SiLU."""
    assert y is not None
    inner = result * silu_slope(y * vectors[0] + vectors[1], interpret)
    return inner, inner * y


def gradient(result: jax.Array, y: jax.Array | None, vectors: list[jax.Array], interpret: bool) -> Any:
    """The gradient by y; vectors: factor, term, slope and level."""
    assert y is not None
    factor, term, slope, level = vectors
    return result * silu_slope(y * factor + term, interpret) * factor + y * slope + level


def walk(
    x: jax.Array,
    kernel: jax.Array,
    emit: Emit,
    cut: Cut,
    vectors: list[jax.Array],
    y: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Convolves and emits, down the rows of two images of 32 columns, or as many as make 64 cells.

    Args:
      x: [N, h, w, 16], w a divisor of 64.
      kernel: [3, 3, 16, 64] of the dtype of `x`.
      emit: one of those above.
      cut: how it is launched.
      vectors: [64] float32 each, for `emit`.
      y: [N, h, w, 64], for `emit`.
      interpret: without a GPU, slowly.

    Returns:
      [N, h, w, 64] of the dtype of `x`, or two sums over all cells [2, 64] float32, by what `emit` makes.
    """
    images, height, width, _ = x.shape
    groups = pl.cdiv(images, POSITIONS // width)
    reduces = emit in (sums, gradient_sums)
    weights = jnp.pad(kernel, ((0, 0), (0, 1), (0, 0), (0, 0))).reshape(3 * SPAN, OUT)
    stacked = jnp.stack([jnp.zeros(OUT, jnp.float32), *vectors]).reshape(-1)  # never empty
    out_shape = jax.ShapeDtypeStruct((groups * 2 * OUT,), jnp.float32)
    if not reduces:
        out_shape = jax.ShapeDtypeStruct((images * height * width * OUT,), x.dtype)
    result = pl.pallas_call(
        functools.partial(_program, shape=x.shape, emit=emit, reduces=reduces, count=len(vectors), interpret=interpret),
        grid=(groups,),
        out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=interpret,
        name=f"conv_norm_{emit.__name__}",
    )(x.reshape(-1), weights, stacked, *([] if y is None else [y.reshape(-1)]))
    return result.reshape(groups, 2, OUT).sum(axis=0) if reduces else result.reshape(images, height, width, OUT)


def _program(
    x_ref: Any,
    weight_ref: Any,
    vector_ref: Any,
    *refs: Any,
    shape: tuple[int, ...],
    emit: Emit,
    reduces: bool,
    count: int,
    interpret: bool,
) -> None:
    images, height, width, channels = shape
    *y_ref, out_ref = refs
    group = pl.program_id(0)
    within, column = divide(jnp.arange(POSITIONS), width)
    image = group * (POSITIONS // width) + within
    there = (image < images)[:, None]
    channel, entry = jnp.arange(OUT), jnp.arange(SPAN)
    offset = divide(entry, channels)[0] - 1  # of the entry's cell: -1, 0, 1, and 2, which is left out
    neighbour = column[:, None] + offset[None, :]
    beside = there & (neighbour >= 0) & (neighbour < width) & (offset < 2)[None, :]
    # Four cells in a row are contiguous: one product, whose last quarter is zeros, serves three taps.
    taps = [weight_ref[pl.ds(dy * SPAN, SPAN), :] for dy in range(3)]
    vectors = [vector_ref[pl.ds((1 + i) * OUT, OUT)][None, :] for i in range(count)]

    def step(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        above, here, *totals = carry  # results of the rows row - 1 and row, as far as they are summed
        row = k - 1
        cell = (image * height + row) * width + column
        inside = beside & (row >= 0) & (row < height)
        tile = pltriton.load(x_ref.at[((cell - 1) * channels)[:, None] + entry[None, :]], mask=inside, other=0.0)
        above, here, below = above + dot(tile, taps[2]), here + dot(tile, taps[1]), dot(tile, taps[0])
        index = ((cell - width) * OUT)[:, None] + channel[None, :]
        mask = jnp.broadcast_to(there & (row >= 1), index.shape)
        y = [pltriton.load(ref.at[index], mask=mask, other=0.0).astype(jnp.float32) for ref in y_ref]
        made = emit(above.astype(tile.dtype).astype(jnp.float32), y[0] if y else None, vectors, interpret)
        if reduces:
            totals = [total + jnp.where(mask, one, 0.0) for total, one in zip(totals, made, strict=True)]
        else:
            pltriton.store(out_ref.at[index], made.astype(out_ref.dtype), mask=mask)
        return here, below, *totals

    zeros = jnp.zeros((POSITIONS, OUT), jnp.float32)
    _, _, *totals = jax.lax.fori_loop(0, height + 2, step, (zeros, zeros) + (zeros,) * (2 * reduces))
    for i, total in enumerate(totals):
        pltriton.store(out_ref.at[(group * 2 + i) * OUT + channel], jnp.sum(total, axis=0))


def forward(
    x: jax.Array, kernel: jax.Array, gamma: jax.Array, beta: jax.Array, cut: Cut, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalise_silu(conv3x3(x, kernel), gamma, beta, 4, EPSILON)`: activation, mean and variance."""
    mean, square = _means(walk(x, kernel, sums, cut, [], interpret=interpret), x)
    variance = jnp.maximum(square - mean * mean, 0)
    scale = gamma * jax.lax.rsqrt(variance + EPSILON)
    vectors = _tiled(scale, beta - mean * scale)
    return walk(x, kernel, activation, cut, vectors, interpret=interpret), mean, variance


def backward(
    gradient_out: jax.Array,
    kernel: jax.Array,
    y: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    cut: Cut,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of conv3x3(normalise_silu(y, gamma, beta, ..), kernel) by y, gamma and beta; kernel [3, 3, 64, 16]."""
    inverse = jax.lax.rsqrt(variance + EPSILON)
    scale = gamma * inverse
    shift = beta - mean * scale
    mirrored = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    totals = walk(gradient_out, mirrored, gradient_sums, cut, _tiled(scale, shift), y, interpret)
    by_beta, by_y = _means(totals, y)
    by_gamma = inverse * (by_y - mean * by_beta)
    slope = -scale * by_gamma * inverse
    level = -scale * by_beta - slope * mean
    result = walk(gradient_out, mirrored, gradient, cut, _tiled(scale, shift, slope, level), y, interpret)
    count = y.size // gamma.size
    return result, by_gamma * count, by_beta * count


def _means(totals: jax.Array, cells: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over cells [2, 64] to means per channel, two of [16]."""
    first, second = totals.reshape(2, PHASES, -1).mean(axis=1) / (cells.size // cells.shape[-1])
    return first, second


def _tiled(*vectors: jax.Array) -> list[jax.Array]:
    return [jnp.tile(vector, PHASES) for vector in vectors]


def operands(case: str, frames: int, side: int) -> tuple[jax.Array, ...]:
    """Of `forward`, or of `backward`."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (3, 3, CHANNELS, OUT) if case == "forward" else (3, 3, OUT, CHANNELS)
    x = jax.random.normal(keys[0], (frames, side, side, CHANNELS), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], shape, jnp.bfloat16) * jnp.bfloat16(0.1)
    channels = OUT // PHASES
    gamma = 1 + 0.1 * jax.random.normal(keys[2], (channels,), jnp.float32)
    beta = 0.1 * jax.random.normal(keys[3], (channels,), jnp.float32)
    if case == "forward":
        return x, kernel, gamma, beta
    y = jax.random.normal(keys[4], (frames, side, side, OUT), jnp.bfloat16) + jnp.bfloat16(0.5)
    _, mean, variance = jax.jit(normalise_silu, static_argnums=(3, 4))(y, gamma, beta, PHASES, EPSILON)
    return x, kernel, y, gamma, beta, mean, variance


def package(case: str, *arrays: jax.Array) -> Any:
    """What the package makes of the operands of a case."""
    if case == "forward":
        x, kernel, gamma, beta = arrays
        return normalise_silu(nn.conv3x3(x, kernel), gamma, beta, PHASES, EPSILON)
    gradient_out, kernel, y, gamma, beta, _, _ = arrays

    def function(y: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        return nn.conv3x3(normalise_silu(y, gamma, beta, PHASES, EPSILON)[0], kernel)

    # Its forward pass: only the statistics are left of it, which a training step has.
    return jax.vjp(function, y, gamma, beta)[1](gradient_out)


def error(found: Any, expected: Any) -> float:
    """The largest difference over the largest value, of the worst of the results."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = ((one.astype(jnp.float32), other.astype(jnp.float32)) for one, other in pairs)
    return max(float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(other))) for one, other in wide)


def row(case: str, name: str, only_check: bool) -> dict[str, Any]:
    """Error on some images, and time on those of a training batch, of one cut or of the package."""
    ours: Any = {"forward": forward, "backward": backward}[case]
    function = functools.partial(package, case) if name == "now" else functools.partial(ours, cut=CUTS[name])
    few = operands(case, 256, SIDE)
    wide = [array.astype(jnp.float32) for array in few]
    expected = jax.jit(functools.partial(package, case))(*wide)
    found: dict[str, Any] = {"error": error(jax.jit(function)(*few), expected)}
    cells = FRAMES * SIDE * SIDE
    read = CHANNELS if case == "forward" else CHANNELS + OUT
    found["floor_ms"] = floors.floor_ms(2.0 * cells * 9 * CHANNELS * OUT, 2.0 * cells * (read + OUT))
    if only_check:
        return found
    run = functools.partial(jax.jit(function), *operands(case, FRAMES, SIDE))
    return found | {"ms": common.queued_ms(run)}


def main() -> None:
    """Command line."""
    processes.main("conv_norm", __doc__, row, ["forward", "backward"], ["now", *CUTS])


if __name__ == "__main__":
    main()
