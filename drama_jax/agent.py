"""The agent: where world model, imagination, behaviour and replay meet, and nothing else.

`init`, `act` and `update` are pure functions of an `AgentState`. `update` is the whole of training for one environment
step: append, sample, train the world model, sample, imagine, train the behaviour (paper algorithm 1). Jit it with the
state donated, and `jax.vmap` it over stacked states for a run of many seeds:

    update = jax.jit(agent.update, donate_argnums=0)

Shapes: E environments, B batch, T time, L horizon, S latent size, D backbone width, A actions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from drama_jax import checks, guard, replay, world_model
from drama_jax.acting import Acting, EncodedActing, act, initial_acting, initial_encoded_acting, player
from drama_jax.agent_imagination import Imagined, imagine
from drama_jax.agent_inspection import imagine_video, reconstruct, state_metrics
from drama_jax.agent_state import (
    AgentState,
    Hyper,
    episode_segments,
    hyper,
    init,
    policy_input,
    resolve,
    sample_latent,
)
from drama_jax.behaviour import actor_critic, ppo
from drama_jax.precision import at_least_float32
from drama_jax.replay import Replay, Transition

__all__ = [
    "Acting",
    "AgentState",
    "EncodedActing",
    "Hyper",
    "Imagined",
    "Metrics",
    "act",
    "episode_segments",
    "hyper",
    "imagine",
    "imagine_video",
    "init",
    "initial_acting",
    "initial_encoded_acting",
    "observe",
    "player",
    "policy_input",
    "reconstruct",
    "resolve",
    "sample_contexts",
    "sample_latent",
    "state_metrics",
    "train_behaviour",
    "train_world_model",
    "update",
]

Metrics = dict[str, jax.Array]


def observe(state: AgentState, transition: Transition) -> AgentState:
    """Appends a step to the replay without training, as before the first update."""
    checks.instances("agent.observe", state=(state, AgentState))
    return dataclasses.replace(state, replay=replay.add(state.replay, transition))


def update(state: AgentState, transition: Transition) -> tuple[AgentState, Metrics]:
    """Appends one step, then trains world model and behaviour once each.

    The replay must hold at least `config.warmup_steps` steps before.

    Args:
      state: donate it to the jitted function, or the replay is copied.
      transition: the newest step.

    Returns:
      The new state and scalar metrics, named by TensorBoard tag.
    """
    state = observe(state, transition)
    state, model_metrics = train_world_model(state)
    state, behaviour_metrics = train_behaviour(state)
    return state, model_metrics | behaviour_metrics


def train_world_model(state: AgentState) -> tuple[AgentState, Metrics]:
    """One world-model update on windows drawn from the replay (paper algorithm 1, lines on world-model learning).

    An update whose loss or gradient is not finite is skipped and counted, see `drama_jax.guard`.
    """
    checks.instances("agent.train_world_model", state=(state, AgentState))
    config, wm = state.config, state.config.world_model
    key, sample_key, noise_key = jax.random.split(state.key, 3)
    starts, memory = replay.sample_training(
        config.replay, state.replay, sample_key, wm.batch_size, wm.batch_length, tau=state.hyper.tau
    )
    batch = replay.gather(memory, starts, wm.batch_length)
    noise_shape = (*batch.rewards.shape, wm.autoencoder.categoricals, wm.autoencoder.classes)
    gumbel = jax.random.gumbel(noise_key, noise_shape, at_least_float32(world_model.compute_dtype(wm)))
    dropout_key = None
    if wm.backbone.has_dropout:
        key, dropout_key = jax.random.split(key)
    model, metrics = world_model.update(
        wm,
        state.world_model,
        batch,
        gumbel,
        episode_segments(config.fidelity, batch.firsts),
        num_actions=state.num_actions,
        learning_rate=state.hyper.world_model_learning_rate,
        dropout_key=dropout_key,
    )
    taken = guard.finite(metrics["total_loss"], metrics["grad_norm"])
    state = dataclasses.replace(
        state,
        world_model=guard.keep(taken, model, state.world_model),
        guard=guard.count(state.guard, guard.WORLD_MODEL, taken, replay.slots(memory, starts)),
        replay=memory,
        key=key,
    )
    return state, {f"world_model/{name}": value for name, value in metrics.items()}


def train_behaviour(state: AgentState) -> tuple[AgentState, Metrics]:
    """One update of actor and critic on imagined rollouts (paper algorithm 1, lines on behaviour learning).

    An update whose loss or gradient is not finite is skipped and counted, see `drama_jax.guard`.
    """
    checks.instances("agent.train_behaviour", state=(state, AgentState))
    config, im = state.config, state.config.imagination
    key, sample_key, imagine_key = jax.random.split(state.key, 3)
    starts, memory = sample_contexts(state, sample_key)
    imagined, normaliser = imagine(state, replay.gather(memory, starts, im.context_length), imagine_key)
    learn: Any = actor_critic.update
    if config.behaviour.name == "ppo":
        key, shuffle_key = jax.random.split(key)
        learn = functools.partial(ppo.update, key=shuffle_key)
    behaviour, metrics = learn(
        config.behaviour,
        config.fidelity,
        dataclasses.replace(state.behaviour, normaliser=normaliser),
        imagined.features,
        imagined.actions,
        imagined.rewards,
        imagined.terminations,
        learning_rate=state.hyper.behaviour_learning_rate,
        entropy_scale=state.hyper.entropy_scale,
    )
    taken = guard.finite(metrics["actor_critic/total_loss"], metrics["actor_critic/grad_norm"])
    state = dataclasses.replace(
        state,
        behaviour=guard.keep(taken, behaviour, state.behaviour),
        guard=guard.count(state.guard, guard.BEHAVIOUR, taken),
        replay=memory,
        key=key,
    )
    return state, metrics


def sample_contexts(state: AgentState, key: jax.Array) -> tuple[jax.Array, Replay]:
    """Draws the windows that imagination starts from: ages of their starts [B] int32, and the replay that counted them.

    The key is consumed.
    """
    config, im = state.config, state.config.imagination
    return replay.sample_imagination(
        config.replay,
        state.replay,
        key,
        im.batch_size,
        im.context_length,
        ratio=im.batch_size / config.world_model.batch_size,
        tau=state.hyper.imagination_tau,
    )
