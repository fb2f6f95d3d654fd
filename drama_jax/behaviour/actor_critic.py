"""The behaviour: an actor and a critic trained on imagined rollouts (Drama, arXiv 2410.08893, section 2.3).

B imagined rollouts, L imagined steps, F = S + D features, A actions. Rollout arrays are aligned so that
`actions[:, t]` is taken in `features[:, t]`, and `rewards[:, t]`, `terminations[:, t]` follow it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from drama_jax import action_space, checks, distributions, optim
from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.behaviour import gpu_actor, networks, normalisers, policies
from drama_jax.behaviour.returns import lambda_returns, survival
from drama_jax.config import BehaviourConfig, Fidelity
from drama_jax.precision import at_least_float32, named

Params = Any


@flax.struct.dataclass
class BehaviourState:
    """Everything behaviour learning carries from one update to the next."""

    params: dict[str, Params]  # {"actor", "critic"}: f32 kernels [in, out], biases and norm scales [out]
    slow_critic: Params  # like params["critic"]: its moving average
    opt_state: optax.OptState  # of optim.make_optimizer, over actor and critic together
    normaliser: normalisers.InputNormaliser  # statistics of the actor's input
    return_scale: normalisers.ReturnScale  # percentiles of the lambda-returns


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


def init(key: jax.Array, config: BehaviourConfig, feature_size: int, num_actions: ActionSpace) -> BehaviourState:
    """A fresh behaviour for features of size F and A actions, or `Continuous(A)`. The key is consumed."""
    checks.instances("behaviour.init", config=(config, BehaviourConfig))
    checks.key("behaviour.init", key)
    checks.integers("behaviour.init", feature_size=feature_size)
    action_space.check("behaviour.init", num_actions)
    dtype = at_least_float32(named(config.compute_dtype))
    actor_key, critic_key = jax.random.split(key)
    features = jnp.zeros((1, feature_size), dtype)
    params = {
        "actor": networks.actor(config, num_actions).init(actor_key, features)["params"],
        "critic": networks.critic(config).init(critic_key, features)["params"],
    }
    return BehaviourState(
        params=params,
        # A copy, not the same buffers: a donated state must not hold one array twice.
        slow_critic=jax.tree.map(jnp.copy, params["critic"]),
        opt_state=optim.make_optimizer(config.optimizer).init(params),
        normaliser=normalisers.init_input(feature_size, dtype),
        return_scale=normalisers.init_return_scale(dtype),
    )


def policy_logits(
    config: BehaviourConfig, params: dict[str, Params], normaliser: normalisers.InputNormaliser, features: jax.Array
) -> jax.Array:
    """Policy logits of features [..., F] -> [..., A] in at least float32. No statistic moves.

    For continuous actions they are the [..., 2 A] outputs that `policies.gaussian` reads.
    """
    function = "behaviour.policy_logits"
    checks.instances(function, config=(config, BehaviourConfig), normaliser=(normaliser, normalisers.InputNormaliser))
    checks.parts(function, "params", params, "actor")
    checks.arrays(function, features=(features, (..., normaliser.mean.shape[0]), "float"))
    inputs = normalisers.apply(normaliser, features)
    logits: jax.Array = networks.actor_of(config, params["actor"]).apply({"params": params["actor"]}, inputs)
    return logits


def sample_actions(
    config: BehaviourConfig,
    params: dict[str, Params],
    normaliser: normalisers.InputNormaliser,
    parts: Sequence[jax.Array],
    key: jax.Array,
) -> jax.Array:
    """Actions drawn from the policy.

    Args:
      config: static.
      params: of the behaviour.
      normaliser: of the features; no statistic moves.
      parts: [B, F_i], which side by side are the features [B, F].
      key: consumed.

    Returns:
      [B] int32, or [B, A] float32 if continuous.
    """
    function = "behaviour.sample_actions"
    checks.instances(function, config=(config, BehaviourConfig), normaliser=(normaliser, normalisers.InputNormaliser))
    checks.parts(function, "params", params, "actor")
    checks.key(function, key)
    checks.arrays(function, **{f"parts[{i}]": (part, ("B", f"F{i}"), "float") for i, part in enumerate(parts)})
    continuous = networks.is_continuous(params["actor"])
    if not continuous and gpu_actor.serves(key, parts, params["actor"]):
        return gpu_actor.choose_actions(key, parts, normaliser, params["actor"])
    logits = policy_logits(config, params, normaliser, jnp.concatenate(list(parts), axis=-1))
    return policies.sample(key, logits, continuous=continuous)


def value_logits(config: BehaviourConfig, critic: Params, features: jax.Array) -> jax.Array:
    """Symlog two-hot logits of the value of features [..., F] -> [..., num_bins] in at least float32."""
    checks.instances("behaviour.value_logits", config=(config, BehaviourConfig))
    checks.parts("behaviour.value_logits", "critic", critic, "hidden_0", "output")
    feature_size = critic["hidden_0"]["kernel"].shape[0]
    checks.arrays("behaviour.value_logits", features=(features, (..., feature_size), "float"))
    logits: jax.Array = networks.critic(config).apply({"params": critic}, features)
    return logits


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
        policy_loss=-jnp.mean(weights * log_probs * advantages),
        value_loss=jnp.mean(weights * distributions.two_hot_loss(raw_values[:, :-1], returns)),
        slow_value_loss=jnp.mean(weights * distributions.two_hot_loss(raw_values[:, :-1], slow_returns)),
        entropy=jnp.mean(weights * policies.entropy(logits, continuous=continuous)),
        logits=logits,
        values=values,
        slow_values=slow_values,
        returns=returns,
        slow_returns=slow_returns,
        return_scale=scale,
    )
    bonus = jnp.asarray(config.entropy_scale if entropy_scale is None else entropy_scale, logits.dtype)
    return terms.policy_loss + terms.value_loss + terms.slow_value_loss - bonus * terms.entropy, terms


def targets(
    config: BehaviourConfig,
    fidelity: Fidelity,
    values: jax.Array,
    slow_values: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the critic learns, and how much each step counts.

    Args:
      config: discount and lambda.
      fidelity: `bootstrap_next_value` and `weight_by_survival` are read here.
      values, slow_values: [B, L+1], of the critic and the slow critic.
      rewards: [B, L].
      terminations: [B, L] bool.

    Returns:
      Lambda-returns by either critic [B, L], and weights [B, L] of the steps, all in the values' dtype.
    """
    rewards = rewards.astype(values.dtype)
    continues = 1 - terminations.astype(values.dtype)
    # Online and slow critic side by side: one scan for both returns.
    returns, slow_returns = lambda_returns(
        jnp.stack([rewards] * 2),
        jnp.stack([values, slow_values]),
        jnp.stack([continues] * 2),
        config.discount,
        config.lambda_,
        bootstrap_next_value=fidelity.bootstrap_next_value,
    )
    weights = survival(continues) if fidelity.weight_by_survival else jnp.ones_like(continues)
    return returns, slow_returns, weights


def action_log_probs(logits: jax.Array, actions: jax.Array, *, continuous: bool = False) -> jax.Array:
    """Log-probabilities [...] of actions [...] int under logits [..., A]; continuous ones see `policies.log_probs`."""
    return policies.log_probs(logits, actions, continuous=continuous)


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
        "advantage": jnp.sqrt(jnp.mean(jnp.square(terms.returns - terms.values[:, :-1]))) / jnp.maximum(1.0, spread),
        "total_loss": total,
        "grad_norm": optim.gradient_norm(opt_state),
        "imagined_reward": jnp.mean(rewards),
        "imagined_value": jnp.mean(terms.values),
        "imagined_termination": jnp.mean(terminations.astype(terms.values.dtype)),
    }
    state = dataclasses.replace(
        state, params=params, slow_critic=slow_critic, opt_state=opt_state, return_scale=terms.return_scale
    )
    return state, {f"actor_critic/{name}": value for name, value in metrics.items()}


def _num_actions(function: str, params: dict[str, Params]) -> ActionSpace:
    """What the actor of these parameters chooses from; of discrete actions only that there are some."""
    checks.parts(function, "state.params", params, "actor")
    actor = params["actor"]
    return Continuous(actor[networks.GAUSSIAN]["bias"].shape[-1] // 2) if networks.is_continuous(actor) else 1


def check_rollouts(
    function: str,
    config: BehaviourConfig,
    fidelity: Fidelity,
    state: BehaviourState,
    features: jax.Array,
    actions: jax.Array,
    rewards: jax.Array,
    terminations: jax.Array,
) -> None:
    """The arguments of an update fit together; `function` is named in the message if not."""
    checks.instances(function, config=(config, BehaviourConfig), fidelity=(fidelity, Fidelity))
    checks.instances(function, state=(state, BehaviourState))
    checks.arrays(
        function,
        actions=(actions, *action_space.spec(_num_actions(function, state.params), ("B", "L"))),
        rewards=(rewards, ("B", "L"), "float"),
        terminations=(terminations, ("B", "L"), "bool"),
    )
    length = actions.shape[1] + 1
    feature_size = state.normaliser.mean.shape[0]
    checks.arrays(function, {"B": actions.shape[0]}, features=(features, ("B", length, feature_size), "float"))
