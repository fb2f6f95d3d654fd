"""Encoder and decoder of vector observations: multilayer perceptrons on symlog values (DreamerV3, arXiv 2301.04104).

Each hidden layer is Dense, RMSNorm (eps 1e-6), SiLU; the decoder ends in one Dense, whose outputs are the observation
in symlog space. Matrix products run in the compute dtype, norms and outputs in at least float32. No statistics.
Shapes: N observations, O entries of one, E embedding size, S latent.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from drama_jax.config import AutoencoderConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32

weight_init = nn.initializers.variance_scaling(1.0, "fan_avg", "truncated_normal")


class Layers(nn.Module):
    """`config.vector_layers` x [Dense, RMSNorm, SiLU], [..., X] -> [..., E] of `dtype`."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(self.dtype)
        x = x.astype(self.dtype)
        for i in range(self.config.vector_layers):
            dense = nn.Dense(
                self.config.vector_units,
                dtype=self.dtype,
                param_dtype=wide,
                kernel_init=weight_init,
                name=f"hidden_{i}",
            )
            x = nn.silu(rms_norm(1e-6, wide, name=f"norm_{i}")(dense(x).astype(wide))).astype(self.dtype)
        return x


class VectorEncoder(nn.Module):
    """Symlog observations [N, O] to features [N, E]."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train  # nothing here depends on it
        return Layers(self.config, self.dtype, name="layers")(x)


class VectorDecoder(nn.Module):
    """Latents [N, S] to symlog observations [N, O] in at least float32."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, latent: jax.Array, train: bool) -> jax.Array:
        del train
        wide = at_least_float32(self.dtype)
        x = Layers(self.config, self.dtype, name="layers")(latent)
        size = self.config.vector_size
        output = nn.Dense(size, dtype=self.dtype, param_dtype=wide, kernel_init=weight_init, name="output")
        return output(x).astype(wide)
