"""Samples of the stochastic latent z: one-hot vectors of K categoricals of C classes, flattened to S = K C.

On a GPU a kernel does what follows the latent head's matrix product; it draws what the plain form draws.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drama_jax import checks, distributions, vae, world_model
from drama_jax.config import WorldModelConfig
from drama_jax.nn import gpu_sample


def sample(config: WorldModelConfig, key: jax.Array, log_probs: jax.Array) -> jax.Array:
    """One-hot samples of log-probabilities [..., K, C] -> [..., S], in the compute dtype. The key is consumed."""
    one_hot = distributions.sample_one_hot(key, log_probs)
    return one_hot.reshape(*one_hot.shape[:-2], -1).astype(world_model.compute_dtype(config))


def sample_prior(config: WorldModelConfig, params: Any, key: jax.Array, features: jax.Array) -> jax.Array:
    """Samples of z_(t+1) ~ p(. | d_t): features [..., D] -> [..., S], in the compute dtype, in evaluation mode.

    Args:
      config: static.
      params: of the world model.
      key: consumed.
      features: d_t.
    """
    function = "latents.sample_prior"
    checks.instances(function, config=(config, WorldModelConfig))
    checks.parts(function, "params", params, "prior_head")
    checks.key(function, key)
    checks.arrays(function, features=(features, (..., config.backbone.width), "float"))
    return _sample_head(config, key, features, params["prior_head"])


def sample_posterior(
    config: WorldModelConfig, state: world_model.WorldModelState, key: jax.Array, frames: jax.Array
) -> jax.Array:
    """Samples of z_t ~ q(. | frame_t), in evaluation mode.

    Args:
      config: static.
      state: of the world model.
      key: consumed.
      frames: uint8 [..., height, width, channels], or vectors float32 [..., O].

    Returns:
      [..., S] in the compute dtype.
    """
    checks.key("latents.sample_posterior", key)
    embedding = world_model.embed(config, state, frames)
    return _sample_head(config, key, embedding, state.params["posterior_head"])


def _sample_head(config: WorldModelConfig, key: jax.Array, features: jax.Array, head: Any) -> jax.Array:
    """Samples of a latent head (`vae.latent_head`) on features [..., D or E]."""
    c, dtype = config.autoencoder, world_model.compute_dtype(config)
    raw, bias = jnp.matmul(features.astype(dtype), head["kernel"].astype(dtype)), head["bias"].astype(dtype)
    if gpu_sample.serves(key, raw, c.classes):
        return gpu_sample.sample_latent(key, raw, bias, classes=c.classes, unimix=c.unimix)
    return sample(config, key, vae.mixed_logits(c, raw + bias))
