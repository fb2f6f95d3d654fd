"""What the critic learns: lambda-returns (Drama, arXiv 2410.08893, section 2.3; DreamerV2, 2010.02193, equation 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from drama_jax import checks
from drama_jax.config import BehaviourConfig, Fidelity

_Affine = tuple[jax.Array, jax.Array]


def lambda_returns(
    rewards: jax.Array,
    values: jax.Array,
    continues: jax.Array,
    discount: float,
    lambda_: float,
    *,
    bootstrap_next_value: bool = True,
) -> jax.Array:
    """Returns that mix bootstraps of every length, computed backwards from G_T = V_T:

        G_t = r_t + discount c_t ((1 - lambda) V_(t+1) + lambda G_(t+1)).

    This linear recurrence is an associative scan: log2(T) batched steps, where a loop would launch T small ones.

    Args:
      rewards: r_t [..., T].
      values: V_t [..., T+1].
      continues: c_t [..., T], 1 unless the step ended the episode.
      discount: gamma, per step.
      lambda_: weight of the longer returns.
      bootstrap_next_value: False puts V_t in place of V_(t+1), as the released code does.

    Returns:
      G_t [..., T].
    """
    function = "lambda_returns"
    checks.arrays(function, rewards=(rewards, (..., "T"), "float"), continues=(continues, (..., "T"), "float"))
    horizon = rewards.shape[-1]
    checks.arrays(function, values=(values, (*rewards.shape[:-1], horizon + 1), "float"))
    checks.numbers(function, 0, 1, discount=discount, lambda_=lambda_)
    bootstrap = values[..., 1:] if bootstrap_next_value else values[..., :-1]
    decay = discount * lambda_ * continues
    # The last step continues into V_T. A mask, not an indexed update: everything up to the scan stays elementwise.
    final = jnp.where(jnp.arange(horizon) == horizon - 1, values[..., 1:], 0)
    inputs = rewards + discount * (1 - lambda_) * continues * bootstrap + decay * final

    def compose(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        # Each pair (d, x) is the map G -> x + d G; the earlier step is applied to the later one's result.
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(compose, (decay, inputs), reverse=True, axis=rewards.ndim - 1)[1]


def survival(continues: jax.Array) -> jax.Array:
    """Probability of reaching step t: the product of c_s over s < t, [..., T] -> [..., T], starting with 1."""
    checks.arrays("survival", continues=(continues, (..., "T"), "float"))
    reached = jnp.cumprod(continues[..., :-1], axis=-1)
    return jnp.concatenate([jnp.ones_like(continues[..., :1]), reached], axis=-1)


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
