"""The behaviour: an actor and a critic trained on imagined rollouts (Drama, arXiv 2410.08893, section 2.3).

B imagined rollouts, L imagined steps, F = S + D features, A actions. Rollout arrays are aligned so that
`actions[:, t]` is taken in `features[:, t]`, and `rewards[:, t]`, `terminations[:, t]` follow it.
"""

from __future__ import annotations

import dataclasses

import flax
import jax
import jax.numpy as jnp
import optax

from drama_jax import distributions, optim
from drama_jax.behaviour import networks, normalisers, policies
from drama_jax.behaviour.returns import targets
from drama_jax.behaviour.state import (
    BehaviourState,
    Params,
    action_log_probs,
    check_rollouts,
    init,
    policy_logits,
    sample_actions,
    value_logits,
)
from drama_jax.config import BehaviourConfig, Fidelity

__all__ = [
    "BehaviourState",
    "LossTerms",
    "action_log_probs",
    "init",
    "loss",
    "policy_logits",
    "sample_actions",
    "targets",
    "update",
    "value_logits",
]


@flax.struct.dataclass
class LossTerms:
    """What `loss` computes on the way; scalars are means over the B * L steps."""

    policy_loss: jax.Array  # [] f32
    value_loss: jax.Array  # [] f32, cross-entropy with the online critic's returns
    slow_value_loss: jax.Array  # [] f32, cross-entropy with the slow critic's returns
    entropy: jax.Array  # [] f32, nats
    logits: jax.Array  # [B, L, A] f32, of the policy; [B, L, 2 A] if continuous
    values: jax.Array  # [B, L+1] f32
    slow_values: jax.Array  # [B, L+1] f32
    returns: jax.Array  # [B, L] f32, from `values`
    slow_returns: jax.Array  # [B, L] f32, from `slow_values`
    return_scale: normalisers.ReturnScale  # moved by `returns`


def loss(
    config: BehaviourConfig,
    fidelity: Fidelity,
    params: dict[str, Params],
    state: BehaviourState,
    features: jax.Array,
    actions: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
    *,
    entropy_scale: float | jax.Array | None = None,
) -> tuple[jax.Array, LossTerms]:
    """Policy gradient, two value cross-entropies and an entropy bonus, as one scalar.

    The advantage (G_t - V_t) / max(1, spread of returns) is a constant for the policy gradient, and the critic
    learns the returns computed with its own values and, with equal weight, those computed with the slow critic's.

    Args:
      config: sizes and coefficients.
      fidelity: `bootstrap_next_value` and `weight_by_survival`, see `targets`.
      params: what the loss is differentiated by; takes the place of `state.params`.
      state: slow critic, input statistics (moved by this batch already) and return scale (not yet moved).
      features: [B, L+1, F], the last column only to bootstrap from.
      actions: [B, L] i32, or [B, L, A] f32 if continuous.
      rewards: [B, L].
      terminations: [B, L] bool.
      entropy_scale: overrides `config.entropy_scale`; may be a traced scalar.

    Returns:
      (loss [], its terms).
    """
    check_rollouts("behaviour.loss", config, fidelity, state, features, actions, rewards, terminations)
    # The networks see rows; taken time-major, as the rollout leaves them in memory, no row has to move.
    logits = policy_logits(config, params, state.normaliser, features[:, :-1])
    raw_values = value_logits(config, params["critic"], features)
    values = distributions.two_hot_decode(jax.lax.stop_gradient(raw_values))
    slow_values = distributions.two_hot_decode(value_logits(config, state.slow_critic, features))

    returns, slow_returns, weights = targets(config, fidelity, values, slow_values, rewards, terminations)
    scale = normalisers.update_return_scale(config, state.return_scale, returns)
    advantages = (returns - values[:, :-1]) / jnp.maximum(1.0, scale.spread)

    continuous = networks.is_continuous(params["actor"])
    log_probs = action_log_probs(logits, actions, continuous=continuous)
    terms = LossTerms(
        policy_loss=-_mean(weights * log_probs * advantages),
        value_loss=_mean(weights * distributions.two_hot_loss(raw_values[:, :-1], returns)),
        slow_value_loss=_mean(weights * distributions.two_hot_loss(raw_values[:, :-1], slow_returns)),
        entropy=_mean(weights * policies.entropy(logits, continuous=continuous)),
        logits=logits,
        values=values,
        slow_values=slow_values,
        returns=returns,
        slow_returns=slow_returns,
        return_scale=scale,
    )
    bonus = jnp.asarray(config.entropy_scale if entropy_scale is None else entropy_scale, logits.dtype)
    return terms.policy_loss + terms.value_loss + terms.slow_value_loss - bonus * terms.entropy, terms


def _mean(x: jax.Array) -> jax.Array:
    """Mean of all numbers.

    A GPU sums up to 16,384 in one block of threads, in which XLA would also compute them and whatever else reads what
    they are made of: the lambda-returns of all rollouts, for the mean reward.
    """
    return jnp.mean(jax.lax.optimization_barrier(x))


@jax.named_scope("behaviour")
def update(
    config: BehaviourConfig,
    fidelity: Fidelity,
    state: BehaviourState,
    features: jax.Array,
    actions: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
    *,
    learning_rate: float | jax.Array | None = None,
    entropy_scale: float | jax.Array | None = None,
) -> tuple[BehaviourState, dict[str, jax.Array]]:
    """One gradient step on imagined rollouts.

    The input statistics move once, with all B * (L+1) rows, before they are used; the slow critic moves last, towards
    the new critic.

    Args:
      config: sizes and coefficients.
      fidelity: which reading of the paper, see `loss`.
      state: the behaviour before the step.
      features: [B, L+1, F]; no gradient flows into them.
      actions: [B, L] i32, or [B, L, A] f32 if continuous.
      rewards: [B, L].
      terminations: [B, L] bool.
      learning_rate: overrides `config.optimizer.learning_rate`; may be a traced scalar.
      entropy_scale: overrides `config.entropy_scale`; may be a traced scalar.

    Returns:
      (state after the step, metrics: scalars []).
    """
    check_rollouts("behaviour.update", config, fidelity, state, features, actions, rewards, terminations)
    state = dataclasses.replace(state, normaliser=normalisers.update(state.normaliser, features))

    def objective(params: dict[str, Params]) -> tuple[jax.Array, LossTerms]:
        return loss(
            config, fidelity, params, state, features, actions, rewards, terminations, entropy_scale=entropy_scale
        )

    (total, terms), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    optimizer = optim.make_optimizer(config.optimizer, learning_rate)
    decay = config.slow_critic_decay
    with jax.named_scope("optimizer"):
        steps, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, steps)
        slow_critic = jax.tree.map(
            lambda slow, new: decay * slow + (1 - decay) * new, state.slow_critic, params["critic"]
        )
    spread = terms.return_scale.spread
    metrics = {
        "policy_loss": terms.policy_loss,
        "value_loss": terms.value_loss,
        "slow_value_loss": terms.slow_value_loss,
        "entropy": terms.entropy,
        "return_scale": spread,
        # What moves the policy beside the entropy: as it is scaled, root of the mean square.
        "advantage": jnp.sqrt(_mean(jnp.square(terms.returns - terms.values[:, :-1]))) / jnp.maximum(1.0, spread),
        "total_loss": total,
        "grad_norm": optim.gradient_norm(opt_state),
        "imagined_reward": _mean(rewards),
        "imagined_value": _mean(terms.values),
        "imagined_termination": _mean(terminations.astype(terms.values.dtype)),
    }
    state = dataclasses.replace(
        state, params=params, slow_critic=slow_critic, opt_state=opt_state, return_scale=terms.return_scale
    )
    return state, {f"actor_critic/{name}": value for name, value in metrics.items()}
