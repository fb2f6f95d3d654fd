"""The world model's training: one pass over a batch, its losses, one optimiser step.

Paper section 2, equations 3 to 5. Letters as in `drama_jax.world_model`.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import optax

from drama_jax import action_space, checks, distributions, optim, vae
from drama_jax.action_space import ActionSpace
from drama_jax.config import WorldModelConfig
from drama_jax.replay import Batch
from drama_jax.world_model import networks
from drama_jax.world_model.inference import observe, prior, reward_logits, termination_logits
from drama_jax.world_model.networks import Params, WorldModelState
from drama_jax.world_model.reconstruction import reconstruction_loss


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
    dtype = networks.compute_dtype(config)
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
    reconstruction = reconstruction_loss(ae, out.reconstruction, batch.frames).mean()
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
    checks.instances("world_model.loss", batch=(batch, Batch))
    # Gathered once: left to itself XLA does it again wherever a frame is read.
    batch = dataclasses.replace(batch, frames=jax.lax.optimization_barrier(batch.frames))
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
