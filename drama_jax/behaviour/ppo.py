"""PPO on imagined rollouts: several clipped steps on each batch (Schulman et al. 2017, arXiv 1707.06347).

Actor, critics, returns and normalisers are those of `actor_critic`, and so is the state, so that either learner
continues what the other has begun. An update goes over the rollouts `epochs` times. At the start of every epoch values,
lambda-returns, the scale of returns and advantages are computed anew; then, for each shuffled minibatch of imagined
steps, the actor's input statistics move, and actor and critic take one step on

    -mean min(ratio adv, clip(ratio, 1 - c, 1 + c) adv) + cross-entropies of the critic - entropy bonus,

ratio being the probability of the action over that at the start of the update, and the slow critic follows. The
warm-up of the learning rate counts updates, not steps of the optimiser. Advantages are not standardised.

B imagined rollouts, L imagined steps, R = B L rows, F features, A actions.
"""

from __future__ import annotations

import dataclasses

import flax
import jax
import jax.numpy as jnp
import optax

from drama_jax import checks, distributions, optim
from drama_jax.behaviour import networks, normalisers, policies
from drama_jax.behaviour.returns import targets
from drama_jax.behaviour.state import (
    BehaviourState,
    Params,
    action_log_probs,
    check_rollouts,
    policy_logits,
    value_logits,
)
from drama_jax.config import BehaviourConfig, Fidelity, OptimizerConfig


@flax.struct.dataclass
class Rows:
    """Imagined steps, in any order, and what they are to teach; R of them, or B x L."""

    features: jax.Array  # [R, F] compute dtype
    actions: jax.Array  # [R] int32, or [R, A] f32
    old_log_probs: jax.Array  # [R] f32, of the actions under the policy that chose them
    advantages: jax.Array  # [R] f32
    returns: jax.Array  # [R] f32, by the critic
    slow_returns: jax.Array  # [R] f32, by the slow critic
    weights: jax.Array  # [R] f32, how much each counts


@flax.struct.dataclass
class StepTerms:
    """What one step of the optimiser computes on the way; scalars are means over its minibatch."""

    policy_loss: jax.Array  # [] f32
    value_loss: jax.Array  # [] f32, cross-entropy with the online critic's returns
    slow_value_loss: jax.Array  # [] f32, cross-entropy with the slow critic's returns
    entropy: jax.Array  # [] f32, nats
    kl: jax.Array  # [] f32, an estimate of how far the policy is from the one that chose the actions
    total_loss: jax.Array  # [] f32
    grad_norm: jax.Array  # [] f32, before clipping


@flax.struct.dataclass
class EpochTerms:
    """What one epoch computes before its minibatches."""

    values: jax.Array  # [B, L+1] f32
    returns: jax.Array  # [B, L] f32, from `values`
    slow_returns: jax.Array  # [B, L] f32, from the slow critic's values


def update(
    config: BehaviourConfig,
    fidelity: Fidelity,
    state: BehaviourState,
    features: jax.Array,
    actions: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
    key: jax.Array,
    *,
    learning_rate: float | jax.Array | None = None,
    entropy_scale: float | jax.Array | None = None,
) -> tuple[BehaviourState, dict[str, jax.Array]]:
    """`config.epochs` passes over imagined rollouts.

    Args:
      config: sizes and coefficients.
      fidelity: `bootstrap_next_value` and `weight_by_survival`, see `actor_critic.targets`; `gradient_through_clip`.
      state: the behaviour before the update, which chose the actions. (In the released code it did so with the input
        statistics of each imagined step; here it is asked again, with those after the rollout.)
      features: [B, L+1, F]; no gradient flows into them.
      actions: [B, L] i32, or [B, L, A] f32 if continuous.
      rewards: [B, L].
      terminations: [B, L] bool.
      key: shuffles the minibatches; consumed.
      learning_rate: overrides `config.optimizer.learning_rate`; may be a traced scalar.
      entropy_scale: overrides `config.entropy_scale`; may be a traced scalar.

    Returns:
      (state after the update, metrics: scalars []), named as those of `actor_critic.update`: losses are means over all
      minibatches, the gradient norm is the largest.
    """
    check_rollouts("ppo.update", config, fidelity, state, features, actions, rewards, terminations)
    checks.key("ppo.update", key)
    order = None
    if rewards.size > config.minibatch_size:
        keys = jax.random.split(key, config.epochs)
        order = jax.vmap(lambda key: jax.random.permutation(key, rewards.size))(keys)
    rollouts = (features, actions, rewards, terminations)
    state, steps, epochs = update_in_order(
        config, fidelity, state, *rollouts, order, learning_rate=learning_rate, entropy_scale=entropy_scale
    )
    names = ("policy_loss", "value_loss", "slow_value_loss", "entropy", "total_loss", "kl")
    metrics = {name: jnp.mean(getattr(steps, name)) for name in names}
    metrics |= {
        "grad_norm": jnp.max(steps.grad_norm),
        "return_scale": state.return_scale.spread,
        "imagined_reward": jnp.mean(rewards),
        "imagined_value": jnp.mean(epochs.values[0]),
        "imagined_termination": jnp.mean(terminations.astype(epochs.values.dtype)),
    }
    return state, {f"actor_critic/{name}": value for name, value in metrics.items()}


@jax.named_scope("behaviour")
def update_in_order(
    config: BehaviourConfig,
    fidelity: Fidelity,
    state: BehaviourState,
    features: jax.Array,
    actions: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
    order: jax.Array | None,
    *,
    learning_rate: float | jax.Array | None = None,
    entropy_scale: float | jax.Array | None = None,
) -> tuple[BehaviourState, StepTerms, EpochTerms]:
    """`update` with given minibatches.

    Args:
      order: [epochs, R] int, a permutation of the rows b L + l for each epoch, cut into minibatches, the last of which
        may be smaller; None for a single minibatch.

    Returns:
      (state, terms of each step [epochs * minibatches], terms of each epoch [epochs, ...]).
    """
    checks.arrays("ppo.update_in_order", order=(order, (config.epochs, rewards.size), "integer or None"))
    # Before anything moves: the policy that chose the actions.
    continuous = networks.is_continuous(state.params["actor"])
    logits = policy_logits(config, state.params, state.normaliser, features[:, :-1])
    old = action_log_probs(logits, actions, continuous=continuous)
    size = rewards.size if order is None else min(config.minibatch_size, rewards.size)
    optimizer = _optimizer(config.optimizer, config.epochs * -(-rewards.size // size), learning_rate)

    def epoch(state: BehaviourState, order: jax.Array | None) -> tuple[BehaviourState, tuple[StepTerms, EpochTerms]]:
        state, rows, terms = _prepare(config, fidelity, state, features, actions, rewards, terminations, old)

        def step(state: BehaviourState, chosen: jax.Array | None) -> tuple[BehaviourState, StepTerms]:
            part = rows if chosen is None else jax.tree.map(lambda array: array[chosen], rows)
            return _step(config, fidelity, state, part, optimizer, entropy_scale)

        if order is None:
            state, steps = step(state, None)
            return state, (jax.tree.map(lambda term: term[None], steps), terms)
        rows = jax.tree.map(lambda array: array.reshape(-1, *array.shape[rewards.ndim :]), rows)
        whole = order.shape[0] // size * size
        state, steps = jax.lax.scan(step, state, order[:whole].reshape(-1, size))
        if whole < order.shape[0]:
            state, last = step(state, order[whole:])
            steps = jax.tree.map(lambda many, one: jnp.append(many, one), steps, last)
        return state, (steps, terms)

    state, (steps, epochs) = jax.lax.scan(epoch, state, order, length=config.epochs)
    return state, jax.tree.map(jnp.ravel, steps), epochs


def _prepare(
    config: BehaviourConfig,
    fidelity: Fidelity,
    state: BehaviourState,
    features: jax.Array,
    actions: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
    old_log_probs: jax.Array,
) -> tuple[BehaviourState, Rows, EpochTerms]:
    """What an epoch is to teach, [B, L, ...]; moves the scale of returns."""
    values, slow_values = (
        distributions.two_hot_decode(value_logits(config, critic, features))
        for critic in (state.params["critic"], state.slow_critic)
    )
    returns, slow_returns, weights = targets(config, fidelity, values, slow_values, rewards, terminations)
    scale = normalisers.update_return_scale(config, state.return_scale, returns)
    rows = Rows(
        features=features[:, :-1],
        actions=actions,
        old_log_probs=old_log_probs,
        advantages=(returns - values[:, :-1]) / jnp.maximum(1.0, scale.spread),
        returns=returns,
        slow_returns=slow_returns,
        weights=weights,
    )
    return dataclasses.replace(state, return_scale=scale), rows, EpochTerms(values, returns, slow_returns)


def _step(
    config: BehaviourConfig,
    fidelity: Fidelity,
    state: BehaviourState,
    rows: Rows,
    optimizer: optax.GradientTransformation,
    entropy_scale: float | jax.Array | None,
) -> tuple[BehaviourState, StepTerms]:
    """Input statistics, actor and critic, slow critic: one minibatch."""
    normaliser = normalisers.update(state.normaliser, rows.features)

    def objective(params: dict[str, Params]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(config, fidelity, params, normaliser, rows, entropy_scale=entropy_scale)

    (total, terms), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    with jax.named_scope("optimizer"):
        steps, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, steps)
        decay = config.slow_critic_decay
        slow_critic = jax.tree.map(
            lambda slow, new: decay * slow + (1 - decay) * new, state.slow_critic, params["critic"]
        )
    state = dataclasses.replace(
        state, params=params, slow_critic=slow_critic, opt_state=opt_state, normaliser=normaliser
    )
    return state, StepTerms(total_loss=total, grad_norm=optim.gradient_norm(opt_state), **terms)


def loss(
    config: BehaviourConfig,
    fidelity: Fidelity,
    params: dict[str, Params],
    normaliser: normalisers.InputNormaliser,
    rows: Rows,
    *,
    entropy_scale: float | jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss [] of a minibatch, and its terms by name.

    Args:
      config: `clip_ratio` and coefficients.
      fidelity: `gradient_through_clip` is read here.
      params: what the loss is differentiated by.
      normaliser: the actor's input statistics.
      rows: the minibatch.
      entropy_scale: overrides `config.entropy_scale`; may be a traced scalar.
    """
    logits = policy_logits(config, params, normaliser, rows.features)
    raw_values = value_logits(config, params["critic"], rows.features)
    continuous = networks.is_continuous(params["actor"])
    difference = action_log_probs(logits, rows.actions, continuous=continuous) - rows.old_log_probs
    ratio = jnp.exp(difference)
    clipped = jnp.clip(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
    if not fidelity.gradient_through_clip:
        # Where both are equal, the smaller one's gradient is half of either's.
        clipped = jax.lax.stop_gradient(clipped)
    gain = jnp.minimum(ratio * rows.advantages, clipped * rows.advantages)
    weights = rows.weights
    terms = {
        "policy_loss": -jnp.mean(weights * gain),
        "value_loss": jnp.mean(weights * distributions.two_hot_loss(raw_values, rows.returns)),
        "slow_value_loss": jnp.mean(weights * distributions.two_hot_loss(raw_values, rows.slow_returns)),
        "entropy": jnp.mean(weights * policies.entropy(logits, continuous=continuous)),
        # Unbiased and never negative, where -difference alone is only unbiased.
        "kl": jnp.mean(weights * (ratio - 1 - difference)),
    }
    bonus = jnp.asarray(config.entropy_scale if entropy_scale is None else entropy_scale, logits.dtype)
    return terms["policy_loss"] + terms["value_loss"] + terms["slow_value_loss"] - bonus * terms["entropy"], terms


def _optimizer(
    config: OptimizerConfig, steps: int, learning_rate: float | jax.Array | None
) -> optax.GradientTransformation:
    """As `optim.make_optimizer`, with `steps` steps of the optimiser to one of the warm-up."""
    rate = config.learning_rate if learning_rate is None else learning_rate
    schedule = optim.warmup(rate, config.warmup_updates)
    return optim.with_schedule(config, lambda count: schedule(count // steps))
