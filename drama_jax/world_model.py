"""The world model: autoencoder, sequence model, and the heads for prior, reward and termination (paper section 2).

    z_t ~ q(z_t | frame_t)     d_t = f(z_<=t, a_<=t)     z_(t+1) ~ p(z_(t+1) | d_t)     r_t, e_t from d_t

d_t has seen the action a_t, so it predicts the *next* latent, and the reward and termination that a_t caused.
Shapes: B batch, T time, K categoricals, C classes, S = K * C, D backbone width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from drama_jax import action_space, backbones, checks, distributions, optim, vae
from drama_jax.action_space import ActionSpace
from drama_jax.config import WorldModelConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32, named
from drama_jax.replay import Batch

Params = Any
Dtype = Any


@flax.struct.dataclass
class WorldModelState:
    """Everything world-model training moves."""

    params: Params  # {encoder, posterior_head, decoder, backbone, prior_head, reward_head, termination_head}, float32
    batch_stats: Params  # {encoder, decoder}, running means and variances, float32
    opt_state: optax.OptState


@flax.struct.dataclass
class Forward:
    """What one pass over a training batch computes; the losses are functions of it."""

    embedding: jax.Array  # [B, T, E]
    posterior: jax.Array  # [B, T, K, C] log-probabilities
    latent: jax.Array  # [B, T, S] one-hot samples, straight-through
    reconstruction: jax.Array  # [B, T, h/2, w/2, 4 channels] in 0..1, phase layout; or symlog [B, T, O]
    features: jax.Array  # [B, T, D]
    prior: jax.Array  # [B, T, K, C] log-probabilities of z_(t+1)
    reward_logits: jax.Array  # [B, T, bins]
    termination_logits: jax.Array  # [B, T]


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


def _backbone(config: WorldModelConfig, num_actions: ActionSpace) -> nn.Module:
    return backbones.make(config.backbone, num_actions, compute_dtype(config))


def _heads(config: WorldModelConfig) -> dict[str, nn.Module]:
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
    params["backbone"] = _backbone(config, num_actions).init(backbone_key, latent, action)["params"]
    features = jnp.zeros((1, config.backbone.width), dtype)
    for head_key, (name, head) in zip(head_keys, _heads(config).items(), strict=True):
        params[name] = head.init(head_key, features)["params"]
    return WorldModelState(params, batch_stats, optim.make_optimizer(config.optimizer).init(params))


def posterior(config: WorldModelConfig, state: WorldModelState, frames: jax.Array) -> jax.Array:
    """Log-probabilities of q(z | frame) in evaluation mode: [..., *frame] -> [..., K, C]."""
    checks.instances("world_model.posterior", config=(config, WorldModelConfig), state=(state, WorldModelState))
    ae = config.autoencoder
    checks.arrays("world_model.posterior", frames=(frames, (..., *ae.frame_shape), ae.frame_dtype))
    embedding = embed(config, state, frames)
    return vae.posterior(config.autoencoder, state.params, embedding, dtype=compute_dtype(config))


def embed(config: WorldModelConfig, state: WorldModelState, frames: jax.Array) -> jax.Array:
    """Features of frames in evaluation mode: [..., *frame] -> [..., E], compute dtype."""
    checks.instances("world_model.embed", config=(config, WorldModelConfig), state=(state, WorldModelState))
    ae, dtype = config.autoencoder, compute_dtype(config)
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
        dtype=compute_dtype(config),
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
    module = _backbone(config, num_actions)
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
    features, window = _backbone(config, num_actions).apply(
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
    features, state = _backbone(config, num_actions).apply(
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
    head = _heads(config)["prior_head"]
    raw = head.apply({"params": params["prior_head"]}, features.astype(compute_dtype(config)))
    return vae.mixed_logits(config.autoencoder, raw)


def reward_logits(config: WorldModelConfig, params: Params, features: jax.Array) -> jax.Array:
    """Two-hot logits of the symlog reward: [..., D] -> [..., bins]."""
    _check_features("reward_logits", config, params, features)
    head = _heads(config)["reward_head"]
    return head.apply({"params": params["reward_head"]}, features.astype(compute_dtype(config)))


def termination_logits(config: WorldModelConfig, params: Params, features: jax.Array) -> jax.Array:
    """Logit of termination: [..., D] -> [...]."""
    _check_features("termination_logits", config, params, features)
    head = _heads(config)["termination_head"]
    return head.apply({"params": params["termination_head"]}, features.astype(compute_dtype(config)))[..., 0]


def forward(
    config: WorldModelConfig,
    params: Params,
    batch_stats: Params,
    batch: Batch,
    gumbel: jax.Array,
    segment_ids: jax.Array | None,
    *,
    num_actions: ActionSpace,
    dropout_key: jax.Array | None = None,
) -> tuple[Forward, Params]:
    """One training-mode pass over a batch.

    Args:
      batch: frames [B, T, *frame], actions [B, T], ... (see `replay.Batch`).
      gumbel: Gumbel noise [B, T, K, C] that decides the posterior samples.
      segment_ids, dropout_key: see `observe`.

    Returns:
      `Forward` and the moved batch statistics.
    """
    checks.instances("world_model.forward", config=(config, WorldModelConfig), batch=(batch, Batch))
    checks.parts("world_model.forward", "params", params, "encoder", "posterior_head", "decoder", "backbone")
    checks.parts("world_model.forward", "batch_stats", batch_stats, "encoder", "decoder")
    dtype = compute_dtype(config)
    ae = config.autoencoder
    checks.arrays(
        "world_model.forward",
        frames=(batch.frames, ("B", "T", *ae.frame_shape), ae.frame_dtype),
        actions=(batch.actions, *action_space.spec(num_actions, ("B", "T"))),
        gumbel=(gumbel, ("B", "T", ae.categoricals, ae.classes), "float"),
        segment_ids=(segment_ids, ("B", "T"), "integer or None"),
    )
    lead = batch.actions.shape[:2]
    phases = vae.to_inputs(ae, batch.frames.reshape(-1, *ae.frame_shape), dtype)
    embedding, batch_stats = vae.encode(ae, params, batch_stats, phases, train=True, dtype=dtype)
    log_posterior = vae.posterior(ae, params, embedding, dtype=dtype).reshape(*lead, ae.categoricals, ae.classes)
    latent = distributions.straight_through(log_posterior, gumbel).reshape(-1, ae.latent_size).astype(dtype)
    reconstruction, batch_stats = vae.decode(ae, params, batch_stats, latent, train=True, dtype=dtype)
    latent = latent.reshape(*lead, -1)
    features, _ = observe(
        config,
        params,
        latent,
        batch.actions,
        num_actions=num_actions,
        segment_ids=segment_ids,
        dropout_key=dropout_key,
    )
    return Forward(
        embedding=embedding.reshape(*lead, -1),
        posterior=log_posterior,
        latent=latent,
        reconstruction=reconstruction.reshape(*lead, *reconstruction.shape[1:]),
        features=features,
        prior=prior(config, params, features),
        reward_logits=reward_logits(config, params, features),
        termination_logits=termination_logits(config, params, features),
    ), batch_stats


@jax.named_scope("losses")
def losses(
    config: WorldModelConfig, out: Forward, batch: Batch, segment_ids: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss and its terms (paper equations 3 to 5; constants as in the released code).

    The two KL terms compare the prior at t with the posterior at t + 1. Where `segment_ids` says that an episode
    starts at t + 1 there is nothing to predict, and the pair does not count.
    """
    ae = config.autoencoder
    checks.arrays(
        "world_model.losses",
        frames=(batch.frames, ("B", "T", *ae.frame_shape), ae.frame_dtype),
        rewards=(batch.rewards, ("B", "T"), "float"),
        terminals=(batch.terminals, ("B", "T"), "bool"),
        segment_ids=(segment_ids, ("B", "T"), "integer or None"),
    )
    dtype = out.reconstruction.dtype
    target = vae.to_inputs(ae, batch.frames.reshape(-1, *ae.frame_shape), dtype)
    error = jnp.square(out.reconstruction - target.reshape(out.reconstruction.shape))
    reconstruction = error.sum(axis=tuple(range(2, error.ndim))).mean()
    reward = distributions.two_hot_loss(out.reward_logits, batch.rewards.astype(dtype)).mean()
    termination = distributions.binary_cross_entropy(out.termination_logits, batch.terminals.astype(dtype)).mean()
    weight = None if segment_ids is None else (segment_ids[:, 1:] == segment_ids[:, :-1]).astype(dtype)
    # Only stop_gradient tells the two KL terms apart, so one forward value serves both.
    dynamics, kl = kl_loss(config, jax.lax.stop_gradient(out.posterior), out.prior, weight)
    representation, _ = kl_loss(config, out.posterior, jax.lax.stop_gradient(out.prior), weight)
    total = (
        reconstruction
        + reward
        + termination
        + config.dynamics_scale * dynamics
        + config.representation_scale * representation
    )
    return total, {
        "reconstruction_loss": reconstruction,
        "reward_loss": reward,
        "termination_loss": termination,
        "dynamics_loss": dynamics,
        "dynamics_kl": kl,
        "representation_loss": representation,
        "representation_kl": kl,
        "total_loss": total,
    }


def kl_loss(
    config: WorldModelConfig, log_posterior: jax.Array, log_prior: jax.Array, weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """KL(posterior_(t+1) || prior_t) summed over categoricals, averaged over valid pairs, with free bits.

    Args:
      log_posterior, log_prior: [B, T, K, C] log-probabilities.
      weight: [B, T - 1], 0 where a pair does not count; None if all do.

    Returns:
      The loss (`distributions.free_bits_kl`) and the mean KL itself.
    """
    return distributions.free_bits_kl(
        log_posterior[:, 1:], log_prior[:, :-1], config.free_bits, weight, each=config.free_bits_each
    )


def loss(
    config: WorldModelConfig,
    params: Params,
    batch_stats: Params,
    batch: Batch,
    gumbel: jax.Array,
    segment_ids: jax.Array | None,
    *,
    num_actions: ActionSpace,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params, Forward]]:
    """`losses` of `forward`: the total, and (terms, moved batch statistics, forward pass)."""
    out, batch_stats = forward(
        config, params, batch_stats, batch, gumbel, segment_ids, num_actions=num_actions, dropout_key=dropout_key
    )
    total, terms = losses(config, out, batch, segment_ids)
    return total, (terms, batch_stats, out)


def update(
    config: WorldModelConfig,
    state: WorldModelState,
    batch: Batch,
    gumbel: jax.Array,
    segment_ids: jax.Array | None,
    *,
    num_actions: ActionSpace,
    learning_rate: jax.Array | float | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[WorldModelState, dict[str, jax.Array]]:
    """One optimiser step on one batch.

    Args:
      gumbel: [B, T, K, C] noise for the posterior samples.
      segment_ids: [B, T] int to drop the recurrent state where an episode starts, or None to let it run on.
      learning_rate: overrides the configured one; may be traced.
      dropout_key: of a backbone that has dropout, which needs it; consumed.

    Returns:
      The new state and scalar metrics.
    """
    checks.instances("world_model.update", config=(config, WorldModelConfig), state=(state, WorldModelState))
    if config.backbone.has_dropout:
        checks.key("world_model.update", dropout_key, "dropout_key")

    def objective(params: Params) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
        total, (terms, batch_stats, _) = loss(
            config,
            params,
            state.batch_stats,
            batch,
            gumbel,
            segment_ids,
            num_actions=num_actions,
            dropout_key=dropout_key,
        )
        return total, (terms, batch_stats)

    (_, (metrics, batch_stats)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    optimizer = optim.make_optimizer(config.optimizer, learning_rate)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["grad_norm"] = optim.gradient_norm(opt_state)
        params = optax.apply_updates(state.params, updates)
    return WorldModelState(params, batch_stats, opt_state), metrics
