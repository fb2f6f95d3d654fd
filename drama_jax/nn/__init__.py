"""The layers that need mathematics of their own: polyphase 5x5 convolutions and batch normalisation that folds."""

from drama_jax.nn.batch_norm import BatchNorm
from drama_jax.nn.convolution import (
    conv3x3,
    conv_stride1,
    conv_stride2,
    conv_transpose_stride1,
    conv_transpose_stride2,
    stencil_stride1,
    stencil_stride2,
    stencil_transpose_stride1,
    stencil_transpose_stride2,
)
from drama_jax.nn.phases import depth_to_space, space_to_depth
from drama_jax.nn.rms_norm import rms_norm

__all__ = [
    "BatchNorm",
    "conv3x3",
    "conv_stride1",
    "conv_stride2",
    "conv_transpose_stride1",
    "conv_transpose_stride2",
    "depth_to_space",
    "rms_norm",
    "space_to_depth",
    "stencil_stride1",
    "stencil_stride2",
    "stencil_transpose_stride1",
    "stencil_transpose_stride2",
]
