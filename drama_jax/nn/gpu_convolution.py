"""3x3 convolutions as GPU kernels, where they beat XLA's, with a fused end.

In evaluation mode batch normalisation is folded into kernel and bias, so that an encoder layer is a convolution with
an elementwise end, which `conv3x3` fuses, together with the layout that the next layer reads.

There are two makes, `nn.gpu_convolution_mosaic` for the large batches of training and imagination and
`nn.gpu_convolution_triton` for all others and for JAX before 0.11; `benchmarks/autoencoder.py` and
`benchmarks/conv_mosaic.py` measure every choice made here.
Notation: N images, h x w cells, I and O channels.

Of the modules of `nn`, only those whose names begin with `gpu` have Pallas names. Functions that launch a kernel are
jitted where they are called several times, so that calls of one size are traced and lowered once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drama_jax.nn import gpu_convolution_triton
from drama_jax.nn.gpu_cells import POSITIONS, pixel_shape
from drama_jax.nn.phases import depth_to_space

HAS_MOSAIC = jax.__version_info__ >= (0, 11)
"""Whether Pallas's Mosaic has the names and arguments that our kernel was written for."""


def available() -> bool:
    """Whether the kernels run here: on a Hopper GPU, where they were measured and whose shared memory they count on."""
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability.partition(".")[0] == "9"


def serves(x: jax.Array, out_channels: int, *, from_phases: bool = False) -> bool:
    """Whether `conv3x3` takes an input [N, h, w, I], or its phases, and is faster than XLA with it."""
    _, height, width, channels = pixel_shape(x.shape, from_phases)
    shape = channels % 16 == 0 and POSITIONS % width == 0 and x.dtype == jnp.bfloat16
    if channels > 64:
        return shape and out_channels <= 64 and height % gpu_convolution_triton.ROWS_HELD == 0
    if channels == 32:
        return _cut_for(x, out_channels, from_phases) is not None  # Triton's is slower than cuDNN
    return shape and channels in (16, 64) and channels * out_channels <= 2048


def conv3x3(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    silu: bool = False,
    from_phases: bool = False,
    to_phases: bool = False,
    name: str = "conv3x3",
) -> jax.Array:
    """3x3 convolution with zero padding, and what follows it, by the faster of the two kernels.

    Args:
      x: [N, h, w, I], or [N, h/2, w/2, 4 I] if `from_phases`; I is 16, 32, 64 or a larger multiple of 16, w a divisor
        of 64, h a multiple of 4 if I > 64.
      kernel: [3, 3, I, O] of the dtype of `x`.
      bias: [O], any float dtype, added if given.
      silu: end with SiLU, to about 11 bits.
      from_phases: read phases of 2x2 cells.
      to_phases: write pixels as phases of 2x2 cells (`nn.space_to_depth` of the result).
      name: what profiles call the kernel, before its channels.

    Returns:
      [N, h, w, O], or [N, h/2, w/2, 4 O] if `to_phases`, in the dtype of `x`.

    Raises:
      ValueError: if the shape is none of these.
    """
    bias = jnp.zeros((kernel.shape[-1],), jnp.float32) if bias is None else bias.astype(jnp.float32)
    cut = _cut_for(x, kernel.shape[-1], from_phases)
    if cut is not None:
        from drama_jax.nn import gpu_convolution_mosaic as mosaic

        return mosaic.conv3x3(
            x, kernel, bias, silu=silu, from_phases=from_phases, to_phases=to_phases, cut=cut, name=name
        )
    x = depth_to_space(x) if from_phases else x
    return gpu_convolution_triton.conv3x3(x, kernel, bias, silu=silu, to_phases=to_phases, name=name)


def _cut_for(x: jax.Array, out_channels: int, from_phases: bool) -> Any:
    """How Mosaic's kernel is to be cut, or None where it does not serve."""
    if not HAS_MOSAIC:
        return None
    # Here, not above: a jaxlib without a GPU need not have what this imports.
    from drama_jax.nn import gpu_convolution_mosaic as mosaic

    return mosaic.cut_for(x, out_channels, from_phases=from_phases)
