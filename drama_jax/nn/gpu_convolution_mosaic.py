"""3x3 convolutions of many images as GPU kernels through Pallas's newer GPU lowering, Mosaic, with a fused end.

The rows of a product are 64 images at one cell, so that no tap crosses the edge of a tile: the tile of a neighbouring
cell is another place in memory, and outside the image TMA fills in zeros. A program has 64 images and a strip of output
rows, a warpgroup or two for each; it walks over the columns, and each input tile, loaded once, serves the output rows
around it and, by weights side by side, three output columns at once, whose sums move along. Here is how it is launched,
in `gpu_convolution_mosaic_program` what it does.

Needs JAX 0.11 (made with 0.11.2) and an H100 or H200; `benchmarks/conv_mosaic.py` measures the choices.
Notation as in `nn.gpu_convolution`; S kernels, one for each seed under `vmap`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from drama_jax.nn.gpu_cells import FULL, pixel_shape
from drama_jax.nn.gpu_convolution_mosaic_program import Cut, Form, M, program, scratch

FASTEST = {
    (64, 32): Cut(),
    (64, 16): Cut(),
    (128, 48): Cut(rows=2, stages=3, behind=2),
    (32, 64): Cut(rows=2, stages=4, behind=2),
}
"""By input and output channels, which are those of preset xs. Not 16 to 64: most of its traffic is what it writes, and
in two rows of two warpgroups it took 0.21 ms where Triton's kernel took 0.17 (2048 images, H100). For 32 to 64 see
`benchmarks/results/conv_mosaic-nvidia-h100-80gb-hbm3.json`."""


def cut_for(x: jax.Array, out_channels: int, *, from_phases: bool = False) -> Cut | None:
    """How to share out the convolution of x [N, h, w, I], or its phases; None where this kernel is not to be used."""
    images, height, width, channels = pixel_shape(x.shape, from_phases)
    cut = FASTEST.get((channels, out_channels))
    if cut is None or x.dtype != jnp.bfloat16 or images % M or height % cut.rows or width % 2:
        return None
    return cut if images // M * (height // cut.rows) >= FULL // 2 else None


def conv3x3(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    silu: bool,
    from_phases: bool = False,
    to_phases: bool,
    cut: Cut,
    name: str = "conv3x3",
    interpret: Any = None,
) -> jax.Array:
    """3x3 convolution with zero padding and bias, all of bfloat16 but the bias.

    Args:
      x: [N, h, w, I], or [N, h / 2, w / 2, 4 I] if `from_phases`; N is a multiple of 64, I is 16, 32 or a multiple of
        64, h and w are even.
      kernel: [3, 3, I, O], O = 16, 32, 48 or 64.
      bias: [O] float32.
      silu: end with SiLU, to about 11 bits.
      from_phases: read phases of 2x2 cells.
      to_phases: write phases of 2x2 cells.
      cut: how the work is shared out.
      name: what profiles call the kernel, before its channels.
      interpret: `plgpu.InterpretGPUParams()` to run without a GPU; all but the zeros outside the image is the same.

    Returns:
      [N, h, w, O], or [N, h / 2, w / 2, 4 O] if `to_phases`.

    Raises:
      ValueError: for other sizes.
    """
    images, height, width, channels = pixel_shape(x.shape, from_phases)
    out = kernel.shape[-1]
    if (
        images % M
        or (channels not in (16, 32) and channels % 64)
        or out not in (16, 32, 48, 64)
        or height % cut.rows
        or out % (8 * cut.parts)
        or (to_phases and (height % 2 or width % 2))
    ):
        raise ValueError(f"x {x.shape} and kernel {kernel.shape} are not of the sizes that the kernel takes")
    each = _for_kernels(Form(silu, from_phases, to_phases), cut, f"{name}_{channels}_{out}", interpret)
    return each(x, kernel[None], bias[None])


def _for_kernels(form: Form, cut: Cut, name: str, interpret: Any) -> Any:
    """Function of x [S N, h, w, I], kernels [S, 3, 3, I, O] and biases [S, O], which `vmap` calls with a larger S."""

    @jax.custom_batching.custom_vmap
    def function(x: jax.Array, kernels: jax.Array, biases: jax.Array) -> jax.Array:
        return _launch(x, kernels, biases, form, cut, name, interpret)

    @function.def_vmap
    def _(size: int, mapped: Sequence[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
        full = (
            operand if has else jnp.broadcast_to(operand, (size, *operand.shape))
            for operand, has in zip(operands, mapped)
        )
        y = function(*(operand.reshape(-1, *operand.shape[2:]) for operand in full))
        return y.reshape(size, -1, *y.shape[1:]), True

    return function


@functools.partial(jax.jit, static_argnames=("form", "cut", "name", "interpret"))
def _launch(
    x: jax.Array,
    kernels: jax.Array,
    biases: jax.Array,
    form: Form,
    cut: Cut,
    name: str,
    interpret: Any,
) -> jax.Array:
    """All kernels, each of as many of the images."""
    images, height, width, channels = pixel_shape(x.shape, form.from_phases)
    seeds, out = biases.shape
    depth = min(channels, 64)
    above = 1
    if interpret is not None:
        # The interpreter moves a tile that begins outside of an array into it, where TMA fills in zeros.
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
        above -= 2 if form.from_phases else 1
    weights = kernels[:, :, ::-1].reshape(seeds, 3, 3, channels // depth, depth, out).transpose(0, 1, 3, 2, 5, 4)
    # [(seed, dy, block, part), (dx from 2 to 0, O / parts), channel]
    weights = weights.reshape(seeds, 3, channels // depth, 3, cut.parts, out // cut.parts, depth).swapaxes(3, 4)
    weights = weights.reshape(-1, 3 * out // cut.parts, depth)
    cells = (height // 2 * (width // 2), 4 * out) if form.to_phases else (height * width, out)
    call: Any = plgpu.kernel(
        functools.partial(program, height=height, width=width, above=above, form=form, cut=cut),
        out_type=jax.ShapeDtypeStruct((images, *cells), x.dtype),
        scratch_types={"smem": scratch(cut, (weights.shape[0] // seeds, *weights.shape[1:]), out)},
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
    return y.reshape(images, height // 2, width // 2, -1) if form.to_phases else y.reshape(images, height, width, out)
