"""Rollouts inside a model (paper section 2.3), written against two callables and no network.

Anything that has a step and a policy can be rolled out: the world model of this package (see `drama_jax.agent`), or a
user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import checks
from drama_jax.nn import gpu_keys

Carry = Any
Output = Any
Policy = Callable[[Carry, Output, jax.Array], tuple[Carry, jax.Array]]
"""(carry, output, key) -> (carry, action [B])."""
Model = Callable[[Carry, Output, jax.Array, jax.Array], tuple[Carry, Output]]
"""(carry, output, action [B], key) -> (carry, next output)."""


@flax.struct.dataclass
class Trajectory:
    """An imagined rollout; B batch, L horizon."""

    outputs: Output  # [L + 1, B, ...] per leaf: the start's output, then one after each action
    actions: jax.Array  # [L, B]


def rollout(
    model: Model,
    policy: Policy,
    start: tuple[Carry, Output],
    horizon: int,
    key: jax.Array,
    *,
    unroll: int = 1,
) -> tuple[Trajectory, Carry]:
    """Alternates policy and model for `horizon` steps as one `lax.scan`.

    Args:
      model: one step of the environment model. `carry` is what it remembers and is not recorded (a recurrent state);
        `output` is what the policy sees and is recorded (a latent and a feature).
      policy: chooses the action; may change the carry (statistics it keeps).
      start: carry and output from which to begin.
      horizon: number of steps, static.
      key: consumed.
      unroll: steps per iteration of the compiled loop, see `jax.lax.scan`.

    Returns:
      The trajectory, time-major, and the final carry.
    """

    body, keys = _prepared("rollout", model, policy, horizon, key)
    checks.integers("rollout", unroll=unroll)
    (carry, last), (outputs, actions) = jax.lax.scan(body, start, keys, unroll=unroll)
    outputs = jax.tree.map(lambda before, end: jnp.concatenate([before, end[None]]), outputs, last)
    return Trajectory(outputs, actions), carry


def rollout_steps(
    model: Model, policy: Policy, start: tuple[Carry, Output], horizon: int, key: jax.Array
) -> tuple[list[Output], list[jax.Array], Carry]:
    """As `rollout`, unrolled whole and not stacked: for those who lay the steps out in memory themselves.

    Returns:
      L + 1 outputs, L actions [B], and the final carry.
    """
    body, keys = _prepared("rollout_steps", model, policy, horizon, key)
    body = jax.jit(body)  # traced once for all steps
    flat = gpu_keys.apart(keys) if gpu_keys.serves(keys) else [key for pair in keys for key in pair]
    loop, outputs, actions = start, [], []
    for pair in zip(flat[::2], flat[1::2]):
        loop, (output, action) = body(loop, pair)
        outputs.append(output)
        actions.append(action)
    carry, last = loop
    return [*outputs, last], actions, carry


def _prepared(
    function: str, model: Model, policy: Policy, horizon: int, key: jax.Array
) -> tuple[Callable[[tuple[Carry, Output], jax.Array], Any], jax.Array]:
    """The body of the loop, which takes a pair of keys, and all of these [L, 2]."""
    if not callable(model) or not callable(policy):
        raise TypeError(f"{function}: model and policy must be functions")
    checks.integers(function, horizon=horizon)
    checks.key(function, key)

    def body(loop: tuple[Carry, Output], keys: Any) -> tuple[tuple[Carry, Output], tuple[Output, jax.Array]]:
        carry, output = loop
        carry, action = policy(carry, output, keys[0])
        carry, following = model(carry, output, action, keys[1])
        return (carry, following), (output, action)

    return body, jax.random.split(key, (horizon, 2))
