"""5x5 convolutions computed as 3x3 convolutions on 2x2 phases (polyphase form).

A grid of 2h x 2w pixels with C channels is also a grid of h x w cells with 4C channels: the four pixels of a cell
are its *phases*, stored phase-major `(row, column, C)` in the channel axis. Write pixel `2i + p` of a line as phase
`p` of cell `i`. Each 5x5 convolution of the autoencoder then touches neighbouring cells only, d in {-1, 0, 1}:

| convolution (per line)                        | as a sum over cells i + d     | kernel index k  |
|-----------------------------------------------|-------------------------------|-----------------|
| stride 2: y[i] = sum_k w[k] x[2i + k - 2]     | phases p in, no phases out    | 2d + p + 2      |
| stride 1: y[o] = sum_k w[k] x[o + k - 2]      | phases p in, phases q out     | 2d + p - q + 2  |
| transposed, stride 2: o = 2i + k - 2          | no phases in, phases q out    | q - 2d + 2      |

with w zero outside 0..4. Parameters keep their 5x5 shape `[5, 5, C_in, C_out]`; only slices of them are rearranged
here. The arithmetic is 36/25 of the direct form, but a dense 3x3 convolution with more channels runs several times
faster, most of all in the backward pass, where a strided convolution turns into a dilated one.
Notation: N images, h x w cells, C_in and C_out channels. All images are channels-last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from drama_jax.checks import arrays as check_arrays
from drama_jax.nn import gpu_convolution, gpu_convolution_gradient
from drama_jax.nn.phases import depth_to_space, space_to_depth


def conv_stride2(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """5x5 convolution, stride 2, padding 2: phases [N, h, w, 4 C_in] -> pixels [N, h, w, C_out].

    Args:
      phases: the input in phase layout.
      kernel: [5, 5, C_in, C_out], cross-correlation as in `lax.conv_general_dilated` and PyTorch.
    """
    return conv3x3(phases, stencil_stride2(kernel))


def conv_stride1(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """5x5 convolution, stride 1, padding 2: phases [N, h, w, 4 C_in] -> phases [N, h, w, 4 C_out]."""
    return conv3x3(phases, stencil_stride1(kernel))


def conv_transpose_stride2(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed 5x5 convolution, stride 2, padding 2, output padding 1: [N, h, w, C_in] -> phases [N, h, w, 4 C_out].

    The kernel is [5, 5, C_in, C_out] with PyTorch's meaning of `ConvTranspose2d`: each input pixel adds
    `kernel` (not mirrored) times its value to the output.
    """
    return conv3x3(x, stencil_transpose_stride2(kernel))


def conv_transpose_stride1(phases: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed 5x5 convolution, stride 1, padding 2: phases [N, h, w, 4 C_in] -> phases [N, h, w, 4 C_out]."""
    return conv3x3(phases, stencil_transpose_stride1(kernel))


def conv3x3(x: jax.Array, kernel: jax.Array, *, from_phases: bool = False, to_phases: bool = False) -> jax.Array:
    """Plain 3x3 convolution, stride 1, zero padding.

    Args:
      x: [N, h, w, I], any float dtype.
      kernel: [3, 3, I, O], of the dtype of `x`.
      from_phases: `x` and its gradient are in phase layout instead, [N, h/2, w/2, 4 I].
      to_phases: likewise the result and its gradient, [N, h/2, w/2, 4 O]. The kernels of a GPU write phases at no cost.

    Returns:
      [N, h, w, O] of the dtype of `x`.

    Raises:
      ValueError: if shapes or dtypes do not fit.
    """
    seen = jax.eval_shape(depth_to_space, x) if from_phases else x
    check_arrays("conv3x3", x=(seen, ("N", "h", "w", "I"), "float"), kernel=(kernel, (3, 3, "I", "O"), str(x.dtype)))
    in_channels, out_channels = kernel.shape[2:]
    # Tensor cores take channels in sixteens. Padded here, the zeros are written by whatever kernel produces `x`;
    # left to cuDNN, it copies whole tensors before and after.
    missing_in, missing_out = (-count % 16 if x.dtype == jnp.bfloat16 else 0 for count in (in_channels, out_channels))
    if not (missing_in or missing_out):
        return _convolve(x, kernel, from_phases, to_phases)
    x = jnp.pad(_as_pixels(x, from_phases), ((0, 0), (0, 0), (0, 0), (0, missing_in)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, missing_in), (0, missing_out)))
    y = _convolve(x, kernel, False, False)[..., :out_channels]
    return space_to_depth(y) if to_phases else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, from_phases: bool, to_phases: bool) -> jax.Array:
    return _convolve_forward(x, kernel, from_phases, to_phases)[0]


def _convolve_forward(
    x: jax.Array, kernel: jax.Array, from_phases: bool, to_phases: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _fastest(x, kernel, from_phases, to_phases), (x, kernel)


def _convolve_backward(
    from_phases: bool, to_phases: bool, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if gpu_convolution.available():
        return _gradients_on_gpu(*saved, gradient, from_phases, to_phases)
    x, kernel = saved
    operands = _as_pixels(x, from_phases), kernel, _as_pixels(gradient, to_phases)
    by_x, by_kernel = lax.platform_dependent(*operands, cpu=_gradients_on_cpu, default=_gradients)
    return space_to_depth(by_x) if from_phases else by_x, by_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _fastest(x: jax.Array, kernel: jax.Array, from_phases: bool, to_phases: bool) -> jax.Array:
    if gpu_convolution.available() and gpu_convolution.serves(x, kernel.shape[-1], from_phases=from_phases):
        return gpu_convolution.conv3x3(x, kernel, from_phases=from_phases, to_phases=to_phases)
    y = _plain(_as_pixels(x, from_phases), kernel)
    return space_to_depth(y) if to_phases else y


def _as_pixels(x: jax.Array, phases: bool) -> jax.Array:
    return depth_to_space(x) if phases else x


def _one_by_one(function: Callable[..., Any]) -> Any:
    """`function` of arrays, which under `vmap` runs once for each of them.

    XLA would make one grouped convolution of them, for which it has slow kernels only; the batches are large enough to
    fill a device one after the other.
    """
    batched = jax.custom_batching.custom_vmap(function)

    def rule(size: int, mapped: Sequence[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        rows = [[array[i] if has else array for array, has in zip(arrays, mapped)] for i in range(size)]
        results = jax.tree.map(lambda *parts: jnp.stack(parts), *(batched(*row) for row in rows))
        return results, jax.tree.map(lambda _: True, results)

    batched.def_vmap(rule)
    return batched


def _directly(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


_each = _one_by_one(_directly)


@jax.custom_batching.custom_vmap
def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _directly(x, kernel)


@_plain.def_vmap
def _plain_batched(size: int, mapped: Sequence[bool], x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, bool]:
    if mapped[1]:
        return jax.vmap(_each, [0 if has else None for has in mapped])(x, kernel), True
    # Of one kernel the new axis is more images.
    y = _plain(x.reshape(-1, *x.shape[2:]), kernel)
    return y.reshape(size, -1, *y.shape[1:]), True


@_one_by_one
def _gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    by_x, by_kernel = jax.vjp(_directly, x, kernel)[1](gradient)
    return by_x, by_kernel


def _gradients_on_gpu(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, from_phases: bool, to_phases: bool
) -> tuple[jax.Array, jax.Array]:
    """Each of the two by our kernel or by cuDNN, as measured to be faster; phases as in `conv3x3`."""
    in_channels, out_channels = kernel.shape[2:]
    by_x, by_kernel = _gradients(_as_pixels(x, from_phases), kernel, _as_pixels(gradient, to_phases))
    if gpu_convolution.serves(gradient, in_channels, from_phases=to_phases):
        by_x = gpu_convolution.conv3x3(gradient, _mirrored(kernel), from_phases=to_phases, to_phases=from_phases)
    elif from_phases:
        by_x = space_to_depth(by_x)
    if gpu_convolution_gradient.serves(x, out_channels, from_phases=from_phases):
        layouts = {"from_phases": from_phases, "to_phases": to_phases}
        by_kernel = gpu_convolution_gradient.kernel_gradient(x, gradient, **layouts).astype(kernel.dtype)
    return by_x, by_kernel


def _mirrored(kernel: jax.Array) -> jax.Array:
    """The kernel whose convolution is the transpose of the kernel's: [3, 3, I, O] -> [3, 3, O, I]."""
    return kernel[::-1, ::-1].transpose(0, 1, 3, 2)


@_one_by_one
def _gradients_on_cpu(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two convolutions with their axes in the forward order.

    Inside a loop XLA's CPU backend leaves the automatic gradient's axis orders as they are and runs them through its
    slowest path, some 20 times slower (measured with jax 0.10.2).
    """
    correlated = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return _directly(gradient, _mirrored(kernel)), correlated.transpose(1, 2, 0, 3)


def _cells(kernel: jax.Array) -> jax.Array:
    """Rows and columns into (cell, phase): [5, 5, I, O] -> [3, 2, 3, 2, I, O], index k = 2 cell + phase."""
    check_arrays("a 5x5 convolution", kernel=(kernel, (5, 5, "I", "O"), "float"))
    in_channels, out_channels = kernel.shape[2:]
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    return padded.reshape(3, 2, 3, 2, in_channels, out_channels)


def stencil_stride2(kernel: jax.Array) -> jax.Array:
    """The 3x3 kernel of `conv_stride2`, k = 2d + p + 2: [5, 5, I, O] -> [3, 3, 4I, O]."""
    cells = _cells(kernel)
    in_channels, out_channels = kernel.shape[2:]
    return cells.transpose(0, 2, 1, 3, 4, 5).reshape(3, 3, 4 * in_channels, out_channels)


def stencil_transpose_stride2(kernel: jax.Array) -> jax.Array:
    """The 3x3 kernel of `conv_transpose_stride2`, k = q - 2d + 2 (cells backwards): [5, 5, I, O] -> [3, 3, I, 4O]."""
    cells = _cells(kernel)[::-1, :, ::-1]
    in_channels, out_channels = kernel.shape[2:]
    return cells.transpose(0, 2, 4, 1, 3, 5).reshape(3, 3, in_channels, 4 * out_channels)


def stencil_stride1(kernel: jax.Array) -> jax.Array:
    """The 3x3 kernel of `conv_stride1`, k = 2d + p - q + 2: [5, 5, I, O] -> [3, 3, 4I, 4O].

    Strided slices instead of a gather: their gradient is a sum of paddings, which XLA fuses into one deterministic
    kernel, where a gather's would be a scatter.
    """
    check_arrays("a 5x5 convolution", kernel=(kernel, (5, 5, "I", "O"), "float"))
    in_channels, out_channels = kernel.shape[2:]
    padded = jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))  # index k + 1; k = -1 and k = 5 are zero

    def taps(p_row: int, p_col: int, q_row: int, q_col: int) -> jax.Array:
        row, col = p_row - q_row + 1, p_col - q_col + 1
        return padded[row : row + 5 : 2, col : col + 5 : 2]

    phases = [(0, 0), (0, 1), (1, 0), (1, 1)]
    mixed = jnp.stack([jnp.stack([taps(*p, *q) for q in phases]) for p in phases])  # [4, 4, 3, 3, I, O]
    return mixed.transpose(2, 3, 0, 4, 1, 5).reshape(3, 3, 4 * in_channels, 4 * out_channels)


def stencil_transpose_stride1(kernel: jax.Array) -> jax.Array:
    """The 3x3 kernel of `conv_transpose_stride1`, that of the mirrored kernel: [5, 5, I, O] -> [3, 3, 4I, 4O]."""
    return stencil_stride1(kernel[::-1, ::-1])
