"""Uniformly random play of whole episodes, in environments written in JAX: what learning has to be compared with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from drama_jax import action_space, checks
from drama_jax.envs.jax_env import JaxEnv, JaxEnvState

_Carry = tuple[JaxEnvState, jax.Array, jax.Array, jax.Array, jax.Array]  # and key, over, returns, lengths


@functools.partial(jax.jit, static_argnames=("env", "episodes", "most_steps"))
def play(env: JaxEnv, key: jax.Array, *, episodes: int, most_steps: int = 10_000) -> tuple[jax.Array, jax.Array]:
    """Plays episodes from their start to their end, all side by side.

    Each environment plays one. Taken from a stretch of play instead, the first episodes to end would favour short ones.

    Args:
      env: the environment; static.
      key: consumed; decides everything.
      episodes: E; static.
      most_steps: an episode that is longer is cut off after so many agent steps; static.

    Returns:
      Undiscounted returns [E] float32, and the episodes' lengths in agent steps [E] int32.
    """
    checks.instances("random_play.play", env=(env, JaxEnv))
    checks.integers("random_play.play", 1, episodes=episodes, most_steps=most_steps)
    checks.key("random_play.play", key)
    key, reset_key = jax.random.split(key)
    state = jax.vmap(env.reset)(jax.random.split(reset_key, episodes))

    def goes_on(carry: _Carry) -> jax.Array:
        _, _, over, _, lengths = carry
        return ~over.all() & (lengths.max() < most_steps)

    def step(carry: _Carry) -> _Carry:
        state, key, over, returns, lengths = carry
        key, action_key, env_key = jax.random.split(key, 3)
        actions = action_space.uniform(action_key, env.num_actions, (episodes,))
        state, outcome = jax.vmap(env.step)(state, actions, jax.random.split(env_key, episodes))
        returns = returns + jnp.where(over, 0.0, outcome.reward)
        return state, key, over | outcome.last, returns, lengths + (~over).astype(jnp.int32)

    start = jnp.zeros(episodes, bool), jnp.zeros(episodes, jnp.float32), jnp.zeros(episodes, jnp.int32)
    *_, returns, lengths = jax.lax.while_loop(goes_on, step, (state, key, *start))
    return returns, lengths
