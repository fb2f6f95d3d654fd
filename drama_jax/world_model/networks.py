"""The networks of the world model, and everything its training moves. Letters as in `drama_jax.world_model`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from drama_jax import action_space, backbones, checks, optim, vae
from drama_jax.action_space import ActionSpace
from drama_jax.config import WorldModelConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32, named

Params = Any
Dtype = Any


@flax.struct.dataclass
class WorldModelState:
    """Everything world-model training moves."""

    params: Params  # {encoder, posterior_head, decoder, backbone, prior_head, reward_head, termination_head}, float32
    batch_stats: Params  # {encoder, decoder}, running means and variances, float32
    opt_state: optax.OptState


class Head(nn.Module):
    """Dense, RMSNorm, SiLU, Dense: [.., D] -> [.., outputs] in at least float32."""

    units: int
    outputs: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        params = at_least_float32(self.dtype)

        def dense(units: int, name: str) -> nn.Dense:
            return nn.Dense(units, dtype=self.dtype, param_dtype=params, kernel_init=vae.weight_init, name=name)

        x = dense(self.units, "hidden")(x).astype(params)
        x = nn.silu(rms_norm(1e-6, params, name="norm")(x))
        return dense(self.outputs, "output")(x.astype(self.dtype)).astype(params)


def compute_dtype(config: WorldModelConfig) -> Dtype:
    """dtype of convolutions and matrix products; `auto` must have been resolved before."""
    return named(config.compute_dtype)


def backbone(config: WorldModelConfig, num_actions: ActionSpace) -> nn.Module:
    """The sequence model."""
    return backbones.make(config.backbone, num_actions, compute_dtype(config))


def heads(config: WorldModelConfig) -> dict[str, nn.Module]:
    """Of features [.., D], by the name of their parameters."""
    dtype = compute_dtype(config)
    return {
        "prior_head": vae.latent_head(config.backbone.width, config.autoencoder, dtype),
        "reward_head": Head(config.head_units, config.num_bins, dtype),
        "termination_head": Head(config.head_units, 1, dtype),
    }


def init(key: jax.Array, config: WorldModelConfig, num_actions: ActionSpace) -> WorldModelState:
    """Freshly initialised parameters, statistics and optimiser. The key is consumed."""
    checks.instances("world_model.init", config=(config, WorldModelConfig))
    checks.key("world_model.init", key)
    action_space.check("world_model.init", num_actions)
    vae_key, backbone_key, *head_keys = jax.random.split(key, 5)
    dtype = compute_dtype(config)
    params, batch_stats = vae.init(vae_key, config.autoencoder, dtype)
    latent = jnp.zeros((1, 2, config.autoencoder.latent_size), dtype)
    action = action_space.zeros(num_actions, (1, 2))
    params["backbone"] = backbone(config, num_actions).init(backbone_key, latent, action)["params"]
    features = jnp.zeros((1, config.backbone.width), dtype)
    for head_key, (name, head) in zip(head_keys, heads(config).items(), strict=True):
        params[name] = head.init(head_key, features)["params"]
    return WorldModelState(params, batch_stats, optim.make_optimizer(config.optimizer).init(params))
