"""What behaviour learning moves, and what its networks say: shared by `actor_critic` and `ppo`.

Letters as in `actor_critic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from drama_jax import action_space, checks, optim
from drama_jax.action_space import ActionSpace
from drama_jax.behaviour import gpu_actor, networks, normalisers, policies
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


def action_log_probs(logits: jax.Array, actions: jax.Array, *, continuous: bool = False) -> jax.Array:
    """Log-probabilities [...] of actions [...] int under logits [..., A]; continuous ones see `policies.log_probs`."""
    return policies.log_probs(logits, actions, continuous=continuous)


def _num_actions(function: str, params: dict[str, Params]) -> ActionSpace:
    """What the actor of these parameters chooses from."""
    checks.parts(function, "state.params", params, "actor")
    return networks.actions_of(params["actor"])


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
