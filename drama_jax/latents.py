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
    raw = _product(features.astype(world_model.compute_dtype(config)), params["prior_head"])
    if gpu_sample.serves(key, raw, config.autoencoder.classes):
        return _by_kernel(config, key, raw, params["prior_head"])
    return sample(config, key, world_model.prior(config, params, features))


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
    raw = _product(embedding, state.params["posterior_head"])
    if gpu_sample.serves(key, raw, config.autoencoder.classes):
        return _by_kernel(config, key, raw, state.params["posterior_head"])
    log_probs = vae.posterior(config.autoencoder, state.params, embedding, dtype=world_model.compute_dtype(config))
    return sample(config, key, log_probs)


def _product(x: jax.Array, head: Any) -> jax.Array:
    return jnp.matmul(x, head["kernel"].astype(x.dtype))


def _by_kernel(config: WorldModelConfig, key: jax.Array, raw: jax.Array, head: Any) -> jax.Array:
    c = config.autoencoder
    return gpu_sample.sample_latent(key, raw, head["bias"].astype(raw.dtype), classes=c.classes, unimix=c.unimix)
