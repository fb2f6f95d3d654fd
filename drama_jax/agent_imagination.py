"""The agent's imagination: rollouts of its world model under its policy that continue real windows (paper section 2.3).

`imagination` has the loop, for any model and policy. Shapes: B batch, T time, L horizon, S latent size, D backbone
width, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import checks, distributions, imagination, world_model
from drama_jax.agent_state import AgentState, episode_segments, policy_input
from drama_jax.behaviour import actor_critic, normalisers
from drama_jax.latents import sample_posterior, sample_prior
from drama_jax.nn import gpu_side_by_side
from drama_jax.replay import Batch


@flax.struct.dataclass
class Imagined:
    """Imagined experience, batch-major."""

    features: jax.Array  # [B, L + 1, S + D] compute dtype
    actions: jax.Array  # [B, L] int32, or [B, L, A] float32
    rewards: jax.Array  # [B, L] at least float32
    terminations: jax.Array  # [B, L] bool


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
        features, caused = _side_by_side(outputs, int(fidelity.reward_follows_action))
        actions = jnp.stack(steps, axis=1)
    else:
        trajectory, (_, normaliser) = imagination.rollout(model, policy, start, horizon, rollout_key, unroll=unroll)
        features = policy_input(state, *trajectory.outputs).swapaxes(0, 1)
        actions, hiddens = trajectory.actions.swapaxes(0, 1), trajectory.outputs[1].swapaxes(0, 1)
        caused = hiddens[:, 1:] if fidelity.reward_follows_action else hiddens[:, :-1]
    # Hidden i has seen action i - 1, so entry i + 1 holds what action i caused (Q2).
    ends = world_model.termination_logits(wm, params, caused)
    imagined = Imagined(
        features=features,
        actions=actions,
        rewards=distributions.two_hot_decode(world_model.reward_logits(wm, params, caused)),
        terminations=ends > 0 if end_key is None else jax.random.bernoulli(end_key, jax.nn.sigmoid(ends)),
    )
    return jax.lax.stop_gradient(imagined), normaliser


def _side_by_side(outputs: Sequence[tuple[jax.Array, jax.Array]], first: int) -> tuple[jax.Array, jax.Array]:
    """The behaviour's features [B, L + 1, S + D] of z [B, S] and d [B, D], in z's dtype; L of the d from `first` on."""
    dtype = outputs[0][0].dtype
    cast = [(z, d.astype(dtype)) for z, d in outputs]
    if gpu_side_by_side.serves(cast):
        return gpu_side_by_side.side_by_side(cast, first)  # in bfloat16, as the heads take d
    flat = jnp.concatenate([x for output in cast for x in output], axis=-1)
    # All in one copy: left to itself XLA makes three of them, through layouts in between.
    features = jax.lax.optimization_barrier(flat).reshape(flat.shape[0], len(outputs), -1)
    return features, jnp.stack([d for _, d in outputs[first : first + len(outputs) - 1]], axis=1)
