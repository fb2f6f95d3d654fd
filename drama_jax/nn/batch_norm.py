"""Batch normalisation with PyTorch's statistics and the SiLU behind it, on pixels or on phases.

(Ioffe & Szegedy 2015, arXiv 1502.03167.) Differs from `flax.linen.BatchNorm` in what the released model depends on or
speed asks for: the running variance uses the unbiased batch variance; in evaluation mode the affine map is returned,
for the caller to fold into the preceding convolution's kernel; and in training the gradient of normalisation and SiLU
together is written out as two passes over the activations, one for the sums per channel and one for the result. On a
GPU those of the first layer are one, which `conv_normalise_silu` shares with the kernel's gradient.

Shapes: y [.., phases * C], where C is the number of channels and `phases` how many phases of a channel the last axis
holds (4 in phase layout, else 1), phase-major.
"""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from drama_jax.nn import gpu_convolution, gpu_first_layer, gpu_first_layer_forward
from drama_jax.nn.convolution import conv3x3
from drama_jax.nn.phases import depth_to_space, space_to_depth

Layout = Literal["same", "phases", "pixels"]
"""What becomes of the activation: nothing, pixels to phases, or phases to pixels."""


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the channel, followed by SiLU.

    Attributes:
      features: C, the number of channels.
      phases: phases per channel in the input's last axis.
      param_dtype: dtype of parameters and statistics.
    """

    features: int
    phases: int = 1
    momentum: float = 0.1
    epsilon: float = 1e-5
    param_dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Parameters `scale` and `bias`, statistics `mean` and `var`, all [C]."""
        shape, dtype = (self.features,), self.param_dtype
        self.gamma = self.param("scale", nn.initializers.ones, shape, dtype)
        self.beta = self.param("bias", nn.initializers.zeros, shape, dtype)
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)

    def folded(self, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Evaluation mode: `(scale [C], shift [C])` such that the normalised output is `y * scale + shift`.

        Args:
          offset: bias [C] of the convolution in front; `y` is without it.
        """
        scale = self.gamma * lax.rsqrt(self.running_var.value + self.epsilon)
        return scale, self.beta + (offset - self.running_mean.value) * scale

    def train_silu(self, y: jax.Array, offset: jax.Array, layout: Layout = "same") -> jax.Array:
        """Training mode: SiLU of `y` normalised by its own statistics, which are recorded.

        Args:
          y: output of the convolution in front without its bias [.., phases * C].
          offset: that bias [C]. It cancels against the batch mean, so it only enters the running mean, and its
            gradient is exactly zero rather than rounding noise.
          layout: the layout that the next layer reads.

        Returns:
          Dtype of `y`, in `layout`.
        """
        result = normalise_silu(y, self.gamma, self.beta, self.phases, self.epsilon, layout)
        return self._record(*result, offset)

    def train_first_silu(self, x: jax.Array, kernel: jax.Array, offset: jax.Array) -> jax.Array:
        """`train_silu(conv3x3(x, kernel), offset)`, fast where nothing asks for the gradient by `x`: the first layer.

        Args:
          x: input of the convolution [N, h, w, I].
          kernel: [3, 3, I, phases * C], of the dtype of `x`.
          offset: as for `train_silu`.

        Returns:
          [N, h, w, phases * C], dtype of `x`.
        """
        if not (gpu_convolution.available() and gpu_first_layer.serves(x, kernel.shape[-1])):
            return self.train_silu(conv3x3(x, kernel), offset)
        # Padded here, the zeros are written once for both passes.
        x, kernel = gpu_first_layer.padded(x, kernel)
        result = conv_normalise_silu(x, kernel, self.gamma, self.beta, self.phases, self.epsilon)
        return self._record(*result, offset)

    def _record(self, activated: jax.Array, mean: jax.Array, var: jax.Array, offset: jax.Array) -> jax.Array:
        """Moves the running statistics; returns the activation."""
        if not self.is_initializing():
            count = activated.size // self.features
            keep = 1 - self.momentum
            unbiased = var * (count / max(count - 1, 1))
            offset = lax.stop_gradient(offset)
            self.running_mean.value = keep * self.running_mean.value + self.momentum * (mean + offset)
            self.running_var.value = keep * self.running_var.value + self.momentum * unbiased
        return activated


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalise_silu(
    y: jax.Array, gamma: jax.Array, beta: jax.Array, phases: int, epsilon: float, layout: Layout = "same"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SiLU(gamma * (y - mean) / sqrt(var + epsilon) + beta) with the mean and biased variance of `y` per channel.

    Args:
      y: [.., phases * C].
      gamma: [C].
      beta: [C].
      phases: static.
      epsilon: static.
      layout: of the activation; part of this function so that its gradient, too, rearranges while it computes.

    Returns:
      The activation in `layout`, dtype of `y`; mean and variance [C] in the dtype of `gamma`. No gradient flows through
      the latter two.
    """
    return _normalise_silu(y, gamma, beta, phases, epsilon, layout)[0]


def _normalise_silu(
    y: jax.Array, gamma: jax.Array, beta: jax.Array, phases: int, epsilon: float, layout: Layout
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    wide = y.astype(gamma.dtype)
    means = _per_channel_mean(wide, phases), _per_channel_mean(jnp.square(wide), phases)
    return _normalise_silu_by(means, y, gamma, beta, phases, epsilon, layout)


def _normalise_silu_by(
    means: tuple[jax.Array, jax.Array],
    y: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    phases: int,
    epsilon: float,
    layout: Layout,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """`_normalise_silu`, given the means of y and of its square, both [C]."""
    mean, square = means
    var = jnp.maximum(square - jnp.square(mean), 0)
    inverse = lax.rsqrt(var + epsilon)
    scale = gamma * inverse
    shift = beta - mean * scale
    factor, term = across(phases, scale, shift)
    activated = nn.silu(y.astype(gamma.dtype) * factor + term).astype(y.dtype)
    return (rearrange(activated, layout), mean, var), (y, scale, shift, mean, inverse)


def _normalise_silu_backward(
    phases: int,
    epsilon: float,
    layout: Layout,
    saved: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    y, scale, shift, mean, inverse = saved
    dtype = scale.dtype
    factor, term = across(phases, scale, shift)

    def widened(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """y, the gradient where y is, and silu'(u)."""
        y = y.astype(dtype)
        u = y * factor + term
        gate = nn.sigmoid(u)
        gradient = rearrange(gradient, {"phases": "pixels", "pixels": "phases"}.get(layout, "same"))
        return y, gradient.astype(dtype), gate * (1 + u * (1 - gate))

    gradient = gradients[0]
    wide, outer, silu_slope = widened(y, gradient)
    by_beta = _per_channel_mean(outer * silu_slope, phases)
    # Not (outer silu_slope) y: that product, needed twice, XLA for an H200 writes to memory in float32.
    by_y = _per_channel_mean(outer * wide * silu_slope, phases)
    by_gamma = inverse * (by_y - mean * by_beta)
    # Behind the barrier both are computed anew instead of being written to memory and read again.
    y, gradient, by_beta, by_gamma = lax.optimization_barrier((y, gradient, by_beta, by_gamma))
    slope, level = across(phases, *_slope_and_level(by_beta, by_gamma, saved))
    wide, outer, silu_slope = widened(y, gradient)
    result = outer * silu_slope * factor + wide * slope + level
    count = y.size // scale.shape[0]
    return result.astype(y.dtype), by_gamma * count, by_beta * count


normalise_silu.defvjp(_normalise_silu, _normalise_silu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def conv_normalise_silu(
    x: jax.Array,
    kernel: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    phases: int,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalise_silu(conv3x3(x, kernel), gamma, beta, phases, epsilon)`, as kernels of a GPU.

    Args:
      x: [N, h, w, 16], of a size that `nn.gpu_first_layer` takes.
      kernel: [3, 3, 16, phases * C], of the dtype of `x`.
      gamma: [C].
      beta: [C].
      phases: static.
      epsilon: static.
      interpret: run the kernels without a GPU, slowly; static.

    Returns:
      As `normalise_silu`, for the layout "same".
    """
    return _conv_normalise_silu(x, kernel, gamma, beta, phases, epsilon, interpret)[0]


def _conv_normalise_silu(
    x: jax.Array, kernel: jax.Array, gamma: jax.Array, beta: jax.Array, phases: int, epsilon: float, interpret: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]]:
    y, sums = gpu_first_layer_forward.conv3x3_and_sums(x, kernel, interpret=interpret)
    result, saved = _normalise_silu_by(_means_of(sums, y, gamma), y, gamma, beta, phases, epsilon, "same")
    return result, (x, kernel, saved)


def _conv_normalise_silu_backward(
    phases: int,
    epsilon: float,
    interpret: bool,
    kept: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
    x, kernel, saved = kept
    y, scale, shift, mean, inverse = saved

    def tiled(vector: jax.Array) -> jax.Array:
        return jnp.tile(vector, phases).astype(jnp.float32)

    vectors = scale.astype(jnp.float32), shift.astype(jnp.float32)
    by_inner, by_output, sums, at_taps = gpu_first_layer.sums(x, y, gradients[0], *vectors, interpret=interpret)
    by_beta, by_y = _means_of(sums, y, scale)
    by_gamma = inverse * (by_y - mean * by_beta)
    slope, level = _slope_and_level(by_beta, by_gamma, saved)
    by_kernel = by_inner * tiled(scale) + by_output * tiled(slope) + at_taps[..., None] * tiled(level)
    # The compiler leaves this out where nothing reads it, as for frames.
    through_norm, _, _ = _normalise_silu_backward(phases, epsilon, "same", saved, gradients)
    (by_x,) = jax.vjp(lambda x: conv3x3(x, kernel), x)[1](through_norm)
    count = y.size // scale.shape[0]
    return by_x, by_kernel.astype(kernel.dtype), by_gamma * count, by_beta * count


conv_normalise_silu.defvjp(_conv_normalise_silu, _conv_normalise_silu_backward)


def _means_of(sums: jax.Array, y: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums [2, phases * C] over the cells of y to means per channel, both of the shape [C] and dtype of `like`."""
    channels = like.shape[0]
    first, second = sums.reshape(2, -1, channels).sum(axis=1).astype(like.dtype) / (y.size // channels)
    return first, second


def _slope_and_level(
    by_beta: jax.Array, by_gamma: jax.Array, saved: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """What the gradient by y gets through the mean and variance: y slope + level, both [C]."""
    _, scale, _, mean, inverse = saved
    slope = -scale * by_gamma * inverse
    return slope, -scale * by_beta - slope * mean


def rearrange(x: jax.Array, layout: str) -> jax.Array:
    """Pixels to phases, phases to pixels, or `x` as it is."""
    if layout == "same":
        return x
    return space_to_depth(x) if layout == "phases" else depth_to_space(x)


def across(phases: int, *vectors: jax.Array) -> list[jax.Array]:
    """Vectors [C] for all phases: [phases * C] each.

    On a CPU by way of memory: XLA would compute them anew for every activation they meet, in loops about three times
    slower (jax 0.10.2 and 0.11.2, by hand).
    """
    tiled = [jnp.tile(vector, phases) for vector in vectors]
    return list(lax.optimization_barrier(jnp.stack(tiled))) if jax.default_backend() == "cpu" else tiled


def _per_channel_mean(x: jax.Array, phases: int) -> jax.Array:
    """[.., phases * C] to [C]."""
    return x.mean(axis=tuple(range(x.ndim - 1))).reshape(phases, -1).mean(axis=0)
