"""Evaluation: whole episodes with the arg-max policy, in parallel environments.

Every environment plays a number of episodes fixed in advance. Taking the first episodes to finish instead would favour
short ones. The agent's state is read only: nothing it normalises by moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drama_jax import agent, checks
from drama_jax.envs.base import Env, attempt


@functools.partial(jax.jit, donate_argnums=1)
def _act(state: Any, acting: Any, frames: jax.Array, key: jax.Array, step: int, first: jax.Array) -> Any:
    return agent.act(state, acting, frames, jax.random.fold_in(key, step), first, greedy=True)


def episodes_per_environment(episodes: int, num_envs: int) -> list[int]:
    """`episodes` dealt out to `num_envs` environments, the numbers differing by at most one."""
    checks.integers("evaluation", 0, episodes=episodes)
    checks.integers("evaluation", num_envs=num_envs)
    each, rest = divmod(episodes, num_envs)
    return [each + (index < rest) for index in range(num_envs)]


def evaluate(
    state: Any,
    environment: Env,
    episodes: int,
    key: jax.Array,
    *,
    on_episode: Callable[[float], None] = lambda episode_return: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """Plays `episodes` episodes to their end and returns their undiscounted raw returns, environment by environment.

    Args:
      state: `AgentState`.
      environment: E environments, freshly made.
      episodes: How many episodes in all.
      key: PRNG key, consumed; the latents are sampled in evaluation too.
      on_episode: Called with the return of each counted episode as it ends.
      stop: Asked before every step; True ends the evaluation without a result.

    Returns:
      The returns; None if `stop` ended it.

    Raises:
      EmulatorError: an emulator failed.
    """
    checks.key("evaluation", key)
    quota = episodes_per_environment(episodes, environment.num_envs)
    finished: list[list[float]] = [[] for _ in quota]
    returns = np.zeros(environment.num_envs)
    acting = agent.initial_encoded_acting(state, environment.num_envs)
    if episodes == 0:
        return []
    observation = attempt(environment.reset)
    player = agent.player(state)
    step = 0
    while any(len(done) < wanted for done, wanted in zip(finished, quota)):
        if stop():
            return None
        frames = jax.device_put(observation.frames, may_alias=False)
        actions, acting = _act(player, acting, frames, key, step, observation.first)
        observation = attempt(environment.step, np.asarray(actions))
        returns += observation.rewards
        for index in np.flatnonzero(observation.last):
            if len(finished[index]) < quota[index]:
                finished[index].append(float(returns[index]))
                on_episode(float(returns[index]))
            returns[index] = 0.0
        step += 1
    return [episode_return for done in finished for episode_return in done]
