"""What the agent is: its state, how one is made, and what acting and imagination both do with it.

Shapes: E environments, B batch, T time, S latent size, D backbone width, K categoricals, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import action_space, checks, guard, latents, replay, world_model
from drama_jax.action_space import ActionSpace
from drama_jax.behaviour import actor_critic
from drama_jax.config import AgentConfig, Fidelity
from drama_jax.replay import Replay


@flax.struct.dataclass
class Hyper:
    """Numbers that may differ between vmapped agents; initialised from the configuration."""

    world_model_learning_rate: jax.Array  # [] float32
    behaviour_learning_rate: jax.Array  # [] float32
    entropy_scale: jax.Array  # [] float32
    tau: jax.Array  # [] float32
    imagination_tau: jax.Array  # [] float32


@flax.struct.dataclass
class AgentState:
    """Everything the agent is and remembers."""

    world_model: world_model.WorldModelState
    behaviour: actor_critic.BehaviourState
    replay: Replay
    hyper: Hyper
    guard: guard.Guard
    key: jax.Array  # [] PRNG key, split by every update
    config: AgentConfig = flax.struct.field(pytree_node=False)
    num_actions: ActionSpace = flax.struct.field(pytree_node=False)


def resolve(config: AgentConfig) -> AgentConfig:
    """The configuration with `compute_dtype="auto"` decided: bfloat16 on an accelerator, float32 on a CPU."""
    checks.instances("agent", config=(config, AgentConfig))
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def decide(part: Any) -> Any:
        return dataclasses.replace(part, compute_dtype=dtype) if part.compute_dtype == "auto" else part

    return dataclasses.replace(config, world_model=decide(config.world_model), behaviour=decide(config.behaviour))


def hyper(config: AgentConfig) -> Hyper:
    """The numbers of a configuration that may differ between agents of one program."""
    return Hyper(
        world_model_learning_rate=jnp.asarray(config.world_model.optimizer.learning_rate, jnp.float32),
        behaviour_learning_rate=jnp.asarray(config.behaviour.optimizer.learning_rate, jnp.float32),
        entropy_scale=jnp.asarray(config.behaviour.entropy_scale, jnp.float32),
        tau=jnp.asarray(config.replay.tau, jnp.float32),
        imagination_tau=jnp.asarray(config.replay.imagination_tau, jnp.float32),
    )


def init(key: jax.Array, config: AgentConfig, num_actions: ActionSpace) -> AgentState:
    """A fresh agent with an empty replay, for A discrete actions or `Continuous(A)`. The key is consumed."""
    checks.key("agent.init", key)
    action_space.check("agent.init", num_actions)
    config = resolve(config)
    ae = config.world_model.autoencoder
    key, model_key, behaviour_key = jax.random.split(key, 3)
    return AgentState(
        world_model=world_model.init(model_key, config.world_model, num_actions),
        behaviour=actor_critic.init(behaviour_key, config.behaviour, config.world_model.feature_size, num_actions),
        replay=replay.init(config.replay, ae.frame_shape, num_actions, dtype=ae.frame_dtype),
        hyper=hyper(config),
        guard=guard.init(config.world_model.batch_size),
        key=key,
        config=config,
        num_actions=num_actions,
    )


def episode_segments(fidelity: Fidelity, firsts: jax.Array) -> jax.Array | None:
    """Segment ids [B, T] that change where an episode starts; None to let the recurrent state run on (Q7)."""
    if not fidelity.reset_at_episode_start:
        return None
    return jnp.cumsum(firsts.astype(jnp.int32), axis=-1)


def sample_latent(state: AgentState, key: jax.Array, log_probs: jax.Array) -> jax.Array:
    """One-hot samples of log-probabilities [..., K, C], flattened to [..., S], in the compute dtype."""
    return latents.sample(state.config.world_model, key, log_probs)


def policy_input(state: AgentState, latent: jax.Array, hidden: jax.Array) -> jax.Array:
    """What actor and critic see: z [..., S] and d [..., D] side by side, in the compute dtype."""
    dtype = world_model.compute_dtype(state.config.world_model)
    return jnp.concatenate([latent.astype(dtype), hidden.astype(dtype)], axis=-1)
