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
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import checks, distributions, guard, imagination, replay, world_model
from drama_jax.acting import Acting, EncodedActing, act, initial_acting, initial_encoded_acting
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
from drama_jax.behaviour import actor_critic, normalisers, ppo
from drama_jax.latents import sample_posterior, sample_prior
from drama_jax.precision import at_least_float32
from drama_jax.replay import Batch, Replay, Transition

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


@flax.struct.dataclass
class Imagined:
    """Imagined experience, batch-major."""

    features: jax.Array  # [B, L + 1, S + D] compute dtype
    actions: jax.Array  # [B, L] int32, or [B, L, A] float32
    rewards: jax.Array  # [B, L] at least float32
    terminations: jax.Array  # [B, L] bool


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


@jax.named_scope("imagination")
def imagine(state: AgentState, context: Batch, key: jax.Array) -> tuple[Imagined, normalisers.InputNormaliser]:
    """Imagined rollouts that continue real windows, in evaluation mode (paper section 2.3).

    Args:
      state: whose world model and policy to use.
      context: real steps [B, context, ...].
      key: consumed.

    Returns:
      The rollouts, and the policy's input statistics (moved only if `normalise_by_training_data` is off).
    """
    checks.instances("agent.imagine", state=(state, AgentState), context=(context, Batch))
    checks.key("agent.imagine", key)
    config, fidelity = state.config, state.config.fidelity
    wm = config.world_model
    params = state.world_model.params
    posterior_key, prior_key, rollout_key = jax.random.split(key, 3)
    end_key = None
    if config.imagination.draw_terminations:
        rollout_key, end_key = jax.random.split(rollout_key)
    latent = sample_posterior(wm, state.world_model, posterior_key, context.frames)
    horizon, unroll = config.imagination.horizon, config.imagination.unroll
    features, recurrent = world_model.open_window(
        wm,
        params,
        latent,
        context.actions,
        num_actions=state.num_actions,
        horizon=horizon,
        segment_ids=episode_segments(fidelity, context.firsts),
        unrolled=unroll >= horizon,
    )
    hidden = features[:, -1]
    latent = sample_prior(wm, params, prior_key, hidden)

    def policy(carry: Any, output: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        recurrent, normaliser = carry
        latent, hidden = output
        parts = (latent, hidden.astype(latent.dtype))
        if not fidelity.normalise_by_training_data:
            normaliser = normalisers.update(normaliser, jnp.concatenate(parts, axis=-1))
        actions = actor_critic.sample_actions(config.behaviour, state.behaviour.params, normaliser, parts, key)
        return (recurrent, normaliser), actions

    def model(carry: Any, output: Any, action: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        recurrent, normaliser = carry
        latent, _ = output
        hidden, recurrent = world_model.step(wm, params, recurrent, latent, action, num_actions=state.num_actions)
        return (recurrent, normaliser), (sample_prior(wm, params, key, hidden), hidden)

    start = ((recurrent, state.behaviour.normaliser), (latent, hidden))
    if unroll >= horizon:
        outputs, steps, (_, normaliser) = imagination.rollout_steps(model, policy, start, horizon, rollout_key)
        features, actions = _side_by_side(outputs), jnp.stack(steps, axis=1)
        hiddens = jnp.stack([hidden for _, hidden in outputs], axis=1)
    else:
        trajectory, (_, normaliser) = imagination.rollout(model, policy, start, horizon, rollout_key, unroll=unroll)
        features = policy_input(state, *trajectory.outputs).swapaxes(0, 1)
        actions, hiddens = trajectory.actions.swapaxes(0, 1), trajectory.outputs[1].swapaxes(0, 1)
    # hidden i has seen action i - 1, so entry i + 1 holds what action i caused (Q2).
    caused = hiddens[:, 1:] if fidelity.reward_follows_action else hiddens[:, :-1]
    ends = world_model.termination_logits(wm, params, caused)
    imagined = Imagined(
        features=features,
        actions=actions,
        rewards=distributions.two_hot_decode(world_model.reward_logits(wm, params, caused)),
        terminations=ends > 0 if end_key is None else jax.random.bernoulli(end_key, jax.nn.sigmoid(ends)),
    )
    return jax.lax.stop_gradient(imagined), normaliser


def _side_by_side(outputs: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """z [B, S] and d [B, D] of all steps as the behaviour's features [B, L + 1, S + D], in z's dtype."""
    dtype = outputs[0][0].dtype
    flat = jnp.concatenate([x.astype(dtype) for output in outputs for x in output], axis=-1)
    # All in one copy: left to itself XLA makes three of them, through layouts in between.
    return jax.lax.optimization_barrier(flat).reshape(flat.shape[0], len(outputs), -1)


def reconstruct(state: AgentState, frames: jax.Array, key: jax.Array) -> jax.Array:
    """Frames through the autoencoder: [..., *frame] -> float of the same shape, images in 0..1."""
    checks.instances("agent.reconstruct", state=(state, AgentState))
    latent = sample_posterior(state.config.world_model, state.world_model, key, frames)
    return world_model.decode(state.config.world_model, state.world_model, latent)


def imagine_video(state: AgentState, batch: Batch, key: jax.Array, context: int) -> jax.Array:
    """Open-loop prediction: reconstructions of `context` real steps, then what the model dreams under the real actions.

    Args:
      batch: real steps [B, T, ...], T > context.
      key: consumed.
      context: how many steps the model sees (static).

    Returns:
      Frames in 0..1 [B, T, height, width, channels], or vectors [B, T, O].
    """
    checks.instances("agent.imagine_video", state=(state, AgentState), batch=(batch, Batch))
    checks.key("agent.imagine_video", key)
    checks.integers("agent.imagine_video", 1, batch.actions.shape[1] - 1, context=context)
    wm, params = state.config.world_model, state.world_model.params
    posterior_key, prior_key, rollout_key = jax.random.split(key, 3)
    latents = sample_posterior(wm, state.world_model, posterior_key, batch.frames[:, :context])
    features, recurrent = world_model.observe(
        wm,
        params,
        latents,
        batch.actions[:, :context],
        num_actions=state.num_actions,
        segment_ids=episode_segments(state.config.fidelity, batch.firsts[:, :context]),
    )
    latent = sample_prior(wm, params, prior_key, features[:, -1])

    def body(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        recurrent, latent = carry
        action, key = inputs
        hidden, recurrent = world_model.step(wm, params, recurrent, latent, action, num_actions=state.num_actions)
        return (recurrent, sample_prior(wm, params, key, hidden)), latent

    actions = batch.actions[:, context:].swapaxes(0, 1)
    _, dreamt = jax.lax.scan(body, (recurrent, latent), (actions, jax.random.split(rollout_key, actions.shape[0])))
    latents = jnp.concatenate([latents, dreamt.swapaxes(0, 1)], axis=1)
    return world_model.decode(wm, state.world_model, latents)


def state_metrics(state: AgentState) -> Metrics:
    """Replay size, quantiles of the DFS counters over the stored steps, skipped updates; by TensorBoard tag."""
    memory = state.replay
    held = jnp.arange(memory.capacity) < memory.size
    metrics = {"replay/size": memory.size.astype(jnp.float32)}
    levels = {"q10": 0.1, "q50": 0.5, "q90": 0.9, "max": 1.0}
    for name, counter in (("trained", memory.counters.trained), ("imagined", memory.counters.imagined)):
        counts = jnp.where(held, counter.astype(jnp.float32), jnp.nan)
        quantiles = jnp.nanquantile(counts, jnp.asarray(list(levels.values())))
        metrics |= {f"dfs/{name}_{level}": quantile for level, quantile in zip(levels, quantiles, strict=True)}
    return metrics | guard.metrics(state.guard)
