"""What the world model says of frames, latents and actions, in evaluation mode but for what gradients go through.

Letters as in `drama_jax.world_model`.
"""

from __future__ import annotations

from typing import Any

import jax

from drama_jax import action_space, checks, vae
from drama_jax.action_space import ActionSpace
from drama_jax.config import WorldModelConfig
from drama_jax.world_model import networks
from drama_jax.world_model.networks import Params, WorldModelState


def posterior(config: WorldModelConfig, state: WorldModelState, frames: jax.Array) -> jax.Array:
    """Log-probabilities of q(z | frame) in evaluation mode: [..., *frame] -> [..., K, C]."""
    checks.instances("world_model.posterior", config=(config, WorldModelConfig), state=(state, WorldModelState))
    ae = config.autoencoder
    checks.arrays("world_model.posterior", frames=(frames, (..., *ae.frame_shape), ae.frame_dtype))
    embedding = embed(config, state, frames)
    return vae.posterior(config.autoencoder, state.params, embedding, dtype=networks.compute_dtype(config))


def embed(config: WorldModelConfig, state: WorldModelState, frames: jax.Array) -> jax.Array:
    """Features of frames in evaluation mode: [..., *frame] -> [..., E], compute dtype."""
    checks.instances("world_model.embed", config=(config, WorldModelConfig), state=(state, WorldModelState))
    ae, dtype = config.autoencoder, networks.compute_dtype(config)
    checks.arrays("world_model.embed", frames=(frames, (..., *ae.frame_shape), ae.frame_dtype))
    phases = vae.to_inputs(ae, frames.reshape(-1, *ae.frame_shape), dtype)
    embedding, _ = vae.encode(ae, state.params, state.batch_stats, phases, train=False, dtype=dtype)
    return embedding.reshape(*frames.shape[: frames.ndim - len(ae.frame_shape)], -1)


def decode(config: WorldModelConfig, state: WorldModelState, latent: jax.Array) -> jax.Array:
    """Frames from latents in evaluation mode: [..., S] -> [..., *frame], float32, images in 0..1."""
    checks.instances("world_model.decode", config=(config, WorldModelConfig), state=(state, WorldModelState))
    checks.arrays("world_model.decode", latent=(latent, (..., config.autoencoder.latent_size), "float"))
    lead = latent.shape[:-1]
    phases, _ = vae.decode(
        config.autoencoder,
        state.params,
        state.batch_stats,
        latent.reshape(-1, latent.shape[-1]),
        train=False,
        dtype=networks.compute_dtype(config),
    )
    return vae.to_frames(config.autoencoder, phases).reshape(*lead, *config.autoencoder.frame_shape)


def observe(
    config: WorldModelConfig,
    params: Params,
    latent: jax.Array,
    actions: jax.Array,
    *,
    num_actions: ActionSpace,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Parallel pass of the sequence model.

    Args:
      params: world-model parameters.
      latent: one-hot samples [B, T, S].
      actions: [B, T] int, or float [B, T, A] if continuous.
      num_actions: A, or `Continuous(A)`.
      state: recurrent state to start from; zeros if None.
      segment_ids: [B, T] int; the recurrent state is dropped where the id changes.
      dropout_key: in training, for a backbone that has dropout; consumed.

    Returns:
      d_t [B, T, D] and the recurrent state after the last step.
    """
    _check_sequence("world_model.observe", config, params, latent, actions, num_actions)
    module = networks.backbone(config, num_actions)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    features, state = module.apply(
        {"params": params["backbone"]}, latent, actions, state=state, segment_ids=segment_ids, rngs=rngs
    )
    return features, state


def open_window(
    config: WorldModelConfig,
    params: Params,
    latent: jax.Array,
    actions: jax.Array,
    *,
    num_actions: ActionSpace,
    horizon: int,
    segment_ids: jax.Array | None = None,
    unrolled: bool = False,
) -> tuple[jax.Array, Any]:
    """Parallel pass from an empty past, as `observe`, ready for a short rollout over one-hot latents.

    Args:
      horizon: how many calls of `step` may follow, static.
      segment_ids: [B, T] int; the past is dropped where the id changes.
      unrolled: whether those calls are in a loop that is unrolled whole.

    Returns:
      d_t [B, T, D] and a window, which `step` takes in place of a recurrent state: the same results, for less memory
      traffic if context and horizon are short (see `backbones.mamba2_window`).
    """
    _check_sequence("world_model.open_window", config, params, latent, actions, num_actions)
    features, window = networks.backbone(config, num_actions).apply(
        {"params": params["backbone"]},
        latent,
        actions,
        horizon=horizon,
        segment_ids=segment_ids,
        unrolled=unrolled,
        classes=config.autoencoder.classes,
        method="open_window",
    )
    return features, window


def step(
    config: WorldModelConfig,
    params: Params,
    state: Any,
    latent: jax.Array,
    actions: jax.Array,
    *,
    num_actions: ActionSpace,
) -> tuple[jax.Array, Any]:
    """One step of the sequence model: latent [B, S], actions [B(, A)] -> d [B, D] and the new state or window."""
    _check_sequence("world_model.step", config, params, latent, actions, num_actions, axes=("B",))
    features, state = networks.backbone(config, num_actions).apply(
        {"params": params["backbone"]}, latent, actions, state, method="step"
    )
    return features, state


def _check_sequence(
    function: str,
    config: WorldModelConfig,
    params: Params,
    latent: jax.Array,
    actions: jax.Array,
    num_actions: ActionSpace,
    axes: tuple[str, ...] = ("B", "T"),
) -> None:
    checks.instances(function, config=(config, WorldModelConfig))
    checks.parts(function, "params", params, "backbone")
    action_space.check(function, num_actions)
    size = config.autoencoder.latent_size
    given = (actions, *action_space.spec(num_actions, axes))
    checks.arrays(function, latent=(latent, (*axes, size), "float"), actions=given)


def _check_features(name: str, config: WorldModelConfig, params: Params, features: jax.Array) -> None:
    function = f"world_model.{name}"
    checks.instances(function, config=(config, WorldModelConfig))
    checks.parts(function, "params", params, f"{name.removesuffix('_logits')}_head")
    checks.arrays(function, features=(features, (..., config.backbone.width), "float"))


def prior(config: WorldModelConfig, params: Params, features: jax.Array) -> jax.Array:
    """Log-probabilities of p(z_(t+1) | d_t): [..., D] -> [..., K, C], in at least float32."""
    _check_features("prior", config, params, features)
    head = networks.heads(config)["prior_head"]
    raw = head.apply({"params": params["prior_head"]}, features.astype(networks.compute_dtype(config)))
    return vae.mixed_logits(config.autoencoder, raw)


def reward_logits(config: WorldModelConfig, params: Params, features: jax.Array) -> jax.Array:
    """Two-hot logits of the symlog reward: [..., D] -> [..., bins]."""
    _check_features("reward_logits", config, params, features)
    head = networks.heads(config)["reward_head"]
    return head.apply({"params": params["reward_head"]}, features.astype(networks.compute_dtype(config)))


def termination_logits(config: WorldModelConfig, params: Params, features: jax.Array) -> jax.Array:
    """Logit of termination: [..., D] -> [...]."""
    _check_features("termination_logits", config, params, features)
    head = networks.heads(config)["termination_head"]
    return head.apply({"params": params["termination_head"]}, features.astype(networks.compute_dtype(config)))[..., 0]
