"""Batch normalisation with PyTorch's statistics, on pixels or on phases, foldable into the preceding convolution.

(Ioffe & Szegedy 2015, arXiv 1502.03167.) Differs from `flax.linen.BatchNorm` in two ways that the released model
depends on or that speed asks for: the running variance uses the unbiased batch variance, and the affine map is
returned instead of applied, so that the caller can apply it to activations (training) or to the convolution's
kernel (evaluation).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """Scale and shift of batch normalisation over every axis but the channel.

    Attributes:
      features: C, the number of channels.
      phases: how many phases of one channel the input's last axis holds (4 in phase layout, else 1); the input's
        last axis is `phases * C`, phase-major.
      param_dtype: dtype of parameters and statistics.
    """

    features: int
    phases: int = 1
    momentum: float = 0.1
    epsilon: float = 1e-5
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array | None, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The affine map `(scale [C], shift [C])` such that the normalised output is `x * scale + shift`.

        Args:
          x: convolution output without its bias [..., phases * C], to use (and record) batch statistics; None to use
            the running statistics.
          offset: the convolution's bias [C]. It cancels against the batch mean, so in training it only enters the
            running mean, and its gradient is exactly zero rather than rounding noise.

        Returns:
          Scale and shift in `param_dtype`.
        """
        gamma = self.param("scale", nn.initializers.ones, (self.features,), self.param_dtype)
        beta = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,), self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (self.features,), self.param_dtype)
        if x is None:
            scale = gamma * jax.lax.rsqrt(running_var.value + self.epsilon)
            return scale, beta + (offset - running_mean.value) * scale
        mean, var, count = self._moments(x)
        if not self.is_initializing():
            unbiased = var * (count / max(count - 1, 1))
            keep = 1 - self.momentum
            running_mean.value = keep * running_mean.value + self.momentum * jax.lax.stop_gradient(mean + offset)
            running_var.value = keep * running_var.value + self.momentum * jax.lax.stop_gradient(unbiased)
        scale = gamma * jax.lax.rsqrt(var + self.epsilon)
        return scale, beta - mean * scale

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Mean and biased variance per channel in one pass over `x`, and the number of values behind them."""
        wide = x.astype(self.param_dtype)
        axes = tuple(range(x.ndim - 1))

        def per_channel(moment: jax.Array) -> jax.Array:
            return moment.reshape(self.phases, self.features).mean(axis=0)

        mean = per_channel(wide.mean(axis=axes))
        square = per_channel(jnp.square(wide).mean(axis=axes))
        return mean, jnp.maximum(square - jnp.square(mean), 0), x.size // self.features
