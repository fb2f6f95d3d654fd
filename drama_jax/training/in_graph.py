"""A whole training run as one jitted function: environment, replay, acting and learning inside `jax.lax.scan`.

For environments written in JAX. Nothing crosses to the host until the run is over, and `jax.vmap` over the key is a
run of many seeds. `begin`, `play_randomly` and `train` are the same run in parts, for progress in between.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import action_space, agent, checks, exploration
from drama_jax.agent import Acting, AgentState, Metrics
from drama_jax.config import AgentConfig, ConfigError
from drama_jax.envs.jax_env import JaxEnv, JaxEnvState
from drama_jax.replay import Transition


@flax.struct.dataclass
class Loop:
    """What one step of the run hands to the next."""

    agent: AgentState
    acting: Acting  # one environment
    env: JaxEnvState
    key: jax.Array  # [] PRNG key
    episode_return: jax.Array  # [] float32, of the running episode so far
    episode_length: jax.Array  # [] int32, likewise


@flax.struct.dataclass
class History:
    """What happened, one entry per agent step."""

    rewards: jax.Array  # [steps] float32
    lasts: jax.Array  # [steps] bool, the step ended an episode
    returns: jax.Array  # [steps] float32, undiscounted return up to and including the step
    lengths: jax.Array  # [steps] int32, steps of the episode up to and including this one


def run(config: AgentConfig, env: JaxEnv, key: jax.Array, *, steps: int) -> tuple[AgentState, History, Metrics]:
    """Trains an agent from scratch.

    The first `config.warmup_steps` steps are random and train nothing; each later one is followed by an
    update.

    Args:
      config: the agent; static.
      env: the environment; static.
      key: consumed; decides everything.
      steps: agent steps in all; static.

    Returns:
      The trained agent, the history of the run, and the metrics of every update ([steps - warmup_steps] each).

    Raises:
      ConfigError: if the agent's frames are not the environment's.
    """
    checks.instances("in_graph.run", config=(config, AgentConfig), env=(env, JaxEnv))
    checks.integers("in_graph.run", 0, steps=steps)
    checks.key("in_graph.run", key)
    check_frames(config, env)
    return _run(config, env, key, steps=steps)


def check_frames(config: AgentConfig, env: JaxEnv) -> None:
    """Raises a ConfigError if the agent's frames are not the environment's."""
    expected = config.world_model.autoencoder.frame_shape
    if env.frame_shape != expected:
        raise ConfigError(f"the agent sees frames of shape {expected}, but the environment shows {env.frame_shape}")


@functools.partial(jax.jit, static_argnames=("config", "env", "steps"))
def _run(config: AgentConfig, env: JaxEnv, key: jax.Array, *, steps: int) -> tuple[AgentState, History, Metrics]:
    warmup = min(steps, config.warmup_steps)
    loop, before = play_randomly(env, warmup, begin(config, env, key))
    loop, after, metrics = train(env, steps - warmup, loop)
    history = jax.tree.map(lambda *parts: jnp.concatenate(parts), before, after)
    return loop.agent, history, metrics


def begin(config: AgentConfig, env: JaxEnv, key: jax.Array) -> Loop:
    """The start of `run`, which is this, then `play_randomly` for the warm-up, then `train`, in parts or at once.

    All three are pure functions of one agent, to be jitted and vmapped. The key is consumed.
    """
    checks.instances("in_graph.begin", config=(config, AgentConfig), env=(env, JaxEnv))
    key, agent_key, env_key = jax.random.split(key, 3)
    state = agent.init(agent_key, config, env.num_actions)
    return Loop(
        agent=state,
        acting=agent.initial_acting(state, 1),
        env=env.reset(env_key),
        key=key,
        episode_return=jnp.zeros((), jnp.float32),
        episode_length=jnp.zeros((), jnp.int32),
    )


def play_randomly(env: JaxEnv, steps: int, loop: Loop) -> tuple[Loop, History]:
    """`steps` random steps, which are stored and train nothing; see `AgentConfig.warmup_repeats`."""
    _check("in_graph.play_randomly", env, steps, loop)
    if loop.agent.config.warmup_repeats and steps:
        return _play_on_and_on(env, steps, loop)
    return jax.lax.scan(functools.partial(_random_step, env), loop, length=steps)


def _play_on_and_on(env: JaxEnv, steps: int, loop: Loop) -> tuple[Loop, History]:
    """Random steps whose actions last for random numbers of steps."""
    table = exploration.duration_table(loop.agent.config.warmup_repeats, steps)
    durations = jnp.asarray(table[:-1], jnp.float32)

    def step(carry: tuple[Loop, jax.Array, jax.Array], _: None) -> tuple[tuple[Loop, jax.Array, jax.Array], History]:
        loop, action, left = carry
        key, action_key, duration_key, env_key = jax.random.split(loop.key, 4)
        drawn = 1 + jnp.searchsorted(durations, jax.random.uniform(duration_key), side="right").astype(jnp.int32)
        action = jnp.where(left == 0, action_space.uniform(action_key, env.num_actions), action)
        left = jnp.where(left == 0, drawn, left) - 1
        loop, transition, history = _play(env, dataclasses.replace(loop, key=key), action, env_key)
        loop = dataclasses.replace(loop, agent=agent.observe(loop.agent, transition))
        return (loop, action, left), history

    start = loop, action_space.zeros(env.num_actions, ()), jnp.zeros((), jnp.int32)
    (loop, _, _), history = jax.lax.scan(step, start, length=steps)
    return loop, history


def train(env: JaxEnv, steps: int, loop: Loop) -> tuple[Loop, History, Metrics]:
    """`steps` of the policy's steps, each followed by an update. Metrics [steps].

    The random steps of a running episode are not in the policy's context.
    """
    _check("in_graph.train", env, steps, loop)
    loop, (history, metrics) = jax.lax.scan(functools.partial(_training_step, env), loop, length=steps)
    return loop, history, metrics


def _check(function: str, env: JaxEnv, steps: int, loop: Loop) -> None:
    checks.instances(function, env=(env, JaxEnv), loop=(loop, Loop))
    checks.integers(function, 0, steps=steps)


def _random_step(env: JaxEnv, loop: Loop, _: None) -> tuple[Loop, History]:
    key, action_key, env_key = jax.random.split(loop.key, 3)
    action = action_space.uniform(action_key, env.num_actions)
    loop, transition, history = _play(env, dataclasses.replace(loop, key=key), action, env_key)
    return dataclasses.replace(loop, agent=agent.observe(loop.agent, transition)), history


def _training_step(env: JaxEnv, loop: Loop, _: None) -> tuple[Loop, tuple[History, Metrics]]:
    key, action_key, env_key = jax.random.split(loop.key, 3)
    frames, first = loop.env.frame[None], loop.env.first[None]
    actions, acting = agent.act(loop.agent, loop.acting, frames, action_key, first)
    loop, transition, history = _play(env, dataclasses.replace(loop, key=key, acting=acting), actions[0], env_key)
    state, metrics = agent.update(loop.agent, transition)
    return dataclasses.replace(loop, agent=state), (history, metrics)


def _play(env: JaxEnv, loop: Loop, action: jax.Array, key: jax.Array) -> tuple[Loop, Transition, History]:
    """Plays one action and keeps the books."""
    before = loop.env
    after, outcome = env.step(before, action, key)
    transition = Transition(
        frame=before.frame, action=action, reward=outcome.reward, terminal=outcome.terminal, first=before.first
    )
    total = loop.episode_return + outcome.reward
    length = loop.episode_length + 1
    loop = dataclasses.replace(
        loop,
        env=after,
        episode_return=jnp.where(outcome.last, 0.0, total),
        episode_length=jnp.where(outcome.last, 0, length),
    )
    return loop, transition, History(rewards=outcome.reward, lasts=outcome.last, returns=total, lengths=length)
