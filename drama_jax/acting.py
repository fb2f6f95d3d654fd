"""Choosing actions in environments: the context of the running episodes, and the policy on top of it.

Shapes: E environments, S latent size, K categoricals, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import action_space, checks, world_model
from drama_jax.action_space import Continuous
from drama_jax.agent_state import AgentState, sample_latent
from drama_jax.behaviour import actor_critic, policies
from drama_jax.latents import sample_posterior, sample_prior
from drama_jax.precision import at_least_float32


@flax.struct.dataclass
class Acting:
    """The steps of the running episode that the policy's state is computed from, in each of E environments."""

    frames: jax.Array  # [E, context, height, width, channels] uint8 (or [E, context, O] float32), newest last
    actions: jax.Array  # [E, context] int32, or [E, context, A] float32
    length: jax.Array  # [E] int32, how many of the last entries are valid


@flax.struct.dataclass
class EncodedActing:
    """`Acting` for a world model that stays as it is, as in evaluation: every frame is encoded once.

    Latents are sampled from the kept posteriors anew at every step, as they are from the frames.
    """

    log_probs: jax.Array  # [E, context, K, C] at least float32, posteriors of the frames, newest last
    actions: jax.Array  # [E, context] int32, or [E, context, A] float32
    length: jax.Array  # [E] int32, how many of the last entries are valid


Context = TypeVar("Context", bound=Acting | EncodedActing)


def initial_acting(state: AgentState, num_envs: int) -> Acting:
    """Empty contexts for `num_envs` environments."""
    checks.instances("agent.initial_acting", state=(state, AgentState))
    checks.integers("agent.initial_acting", num_envs=num_envs)
    context = state.config.acting_context
    ae = state.config.world_model.autoencoder
    return Acting(
        frames=jnp.zeros((num_envs, context, *ae.frame_shape), ae.frame_dtype),
        actions=action_space.zeros(state.num_actions, (num_envs, context)),
        length=jnp.zeros((num_envs,), jnp.int32),
    )


def initial_encoded_acting(state: AgentState, num_envs: int) -> EncodedActing:
    """Empty contexts for `num_envs` environments, for a world model that will stay as it is."""
    checks.instances("agent.initial_encoded_acting", state=(state, AgentState))
    checks.integers("agent.initial_encoded_acting", num_envs=num_envs)
    context, wm = state.config.acting_context, state.config.world_model
    shape = (num_envs, context, wm.autoencoder.categoricals, wm.autoencoder.classes)
    return EncodedActing(
        log_probs=jnp.zeros(shape, at_least_float32(world_model.compute_dtype(wm))),
        actions=action_space.zeros(state.num_actions, (num_envs, context)),
        length=jnp.zeros((num_envs,), jnp.int32),
    )


def player(state: AgentState) -> AgentState:
    """What `act` reads of an agent, or of stacked ones: the same arrays, with all others left out (None, or no entry).

    A compiled function looks at every array that it is given, in every call. `act` takes an agent whole as well, but on
    a GPU a call of it for one environment spends about a tenth of its time on arrays that it does not read.
    """
    checks.instances("agent.player", state=(state, AgentState))
    model, behaviour = state.world_model, state.behaviour
    nothing: Any = None
    params = {name: model.params[name] for name in ("encoder", "posterior_head", "backbone", "prior_head")}
    stats = {name: model.batch_stats[name] for name in ("encoder",) if name in model.batch_stats}
    return dataclasses.replace(
        state,
        world_model=dataclasses.replace(model, params=params, batch_stats=stats, opt_state=nothing),
        behaviour=dataclasses.replace(
            behaviour,
            params={"actor": behaviour.params["actor"]},
            slow_critic=nothing,
            opt_state=nothing,
            normaliser=dataclasses.replace(behaviour.normaliser, count=nothing),
            return_scale=nothing,
        ),
        replay=nothing,
        hyper=nothing,
        guard=nothing,
        key=nothing,
    )


def act(
    state: AgentState, acting: Context, frames: jax.Array, key: jax.Array, first: jax.Array, *, greedy: bool = False
) -> tuple[jax.Array, Context]:
    """Chooses actions in E environments; no statistic of the agent moves.

    The policy acts on d of the previous steps and a sample of the prior that d predicts for the current frame, which
    is what it sees in imagination (paper section 2.3); the current frame itself enters the next step's context. An
    episode's first step has no past: there the policy sees the posterior of the frame and d = 0.

    Args:
      state: the agent, or its `player`.
      acting: context of the previous steps, `Acting` or `EncodedActing`; the same actions come of both.
      frames: [E, height, width, channels] uint8, or [E, O] float32, the current frames.
      key: consumed.
      first: [E] bool, the frame starts an episode; clears that environment's context.
      greedy: take the most likely action (if continuous, the median one) instead of sampling one (static).

    Returns:
      Actions [E] int32, or [E, A] float32, and the context including this step.
    """
    checks.instances("agent.act", state=(state, AgentState), acting=(acting, (Acting, EncodedActing)))
    checks.key("agent.act", key)
    ae = state.config.world_model.autoencoder
    checks.arrays("agent.act", {"E": acting.length.shape[0]}, frames=(frames, ("E", *ae.frame_shape), ae.frame_dtype))
    checks.arrays("agent.act", {"E": acting.length.shape[0]}, first=(first, ("E",), "bool"))
    posterior_key, prior_key, action_key, random_key = jax.random.split(key, 4)
    length = jnp.where(first, 0, acting.length)
    empty = length == 0
    latents, remembered = _latents(state, acting, frames, empty, posterior_key)
    parts = _policy_input(state, latents, acting.actions, length, prior_key)
    continuous = isinstance(state.num_actions, Continuous)
    policy = state.config.behaviour, state.behaviour.params, state.behaviour.normaliser
    if greedy:
        logits = actor_critic.policy_logits(*policy, jnp.concatenate(parts, axis=-1))
        actions = policies.greedy(logits, continuous=continuous)
    else:
        actions = actor_critic.sample_actions(*policy, parts, action_key)
    if not state.config.fidelity.first_action_from_policy:
        random = action_space.uniform(random_key, state.num_actions, empty.shape)
        actions = jnp.where(_column(empty, actions), random, actions)
    if not continuous:
        actions = actions.astype(jnp.int32)
    later = dataclasses.replace(
        remembered,
        actions=jnp.concatenate([acting.actions[:, 1:], actions[:, None]], axis=1),
        length=jnp.minimum(length + 1, latents.shape[1]),
    )
    return actions, later


def _latents(
    state: AgentState, acting: Acting | EncodedActing, frames: jax.Array, empty: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any]:
    """Samples of the context's posteriors [E, context, S], and the context with the current frames behind it.

    The current frame borrows the newest slot of an empty context, which has no use for it.
    """
    wm = state.config.world_model
    if isinstance(acting, Acting):
        # One encoder pass serves both cases.
        context = acting.frames.at[:, -1].set(jnp.where(_column(empty, frames), frames, acting.frames[:, -1]))
        later = jnp.concatenate([acting.frames[:, 1:], frames[:, None]], axis=1)
        return sample_posterior(wm, state.world_model, key, context), dataclasses.replace(acting, frames=later)
    now = world_model.posterior(wm, state.world_model, frames)
    log_probs = acting.log_probs.at[:, -1].set(jnp.where(_column(empty, now), now, acting.log_probs[:, -1]))
    later = jnp.concatenate([acting.log_probs[:, 1:], now[:, None]], axis=1)
    return sample_latent(state, key, log_probs), dataclasses.replace(acting, log_probs=later)


def _column(flags: jax.Array, like: jax.Array) -> jax.Array:
    """Flags [E] that broadcast against `like` [E, ...]."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _policy_input(
    state: AgentState, latents: jax.Array, actions: jax.Array, length: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """z [E, S] and d [E, D] of the compute dtype.

    They come from the last `length` entries of latents [E, context, S] and actions [E, context(, A)].
    """
    wm, params = state.config.world_model, state.world_model.params
    empty, steps = length == 0, latents.shape[1]
    valid = jnp.arange(steps) >= steps - length[:, None]
    hidden, _ = world_model.observe(
        wm, params, latents, actions, num_actions=state.num_actions, segment_ids=valid.astype(jnp.int32)
    )
    hidden = hidden[:, -1]
    latent = sample_prior(wm, params, key, hidden)
    latent = jnp.where(empty[:, None], latents[:, -1], latent)
    hidden = jnp.where(empty[:, None], jnp.zeros_like(hidden), hidden)
    return latent, hidden.astype(latent.dtype)
