"""What people look at: reconstructed frames, dreams under real actions, counts. Nothing of it trains the agent."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drama_jax import checks, guard, world_model
from drama_jax.agent_state import AgentState, episode_segments
from drama_jax.latents import sample_posterior, sample_prior
from drama_jax.replay import Batch


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


def state_metrics(state: AgentState) -> dict[str, jax.Array]:
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
