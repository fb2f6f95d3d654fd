"""How well the world model predicts the next frame, against copying the current one.

Three latents are decoded and compared with the true frame t + 1: the mode of the prior given everything up to frame t
and action t, the mode of the posterior of frame t (the copy), and the mode of the posterior of frame t + 1 (the best
that the autoencoder allows). All three go through the same decoder, so only what the latent knows tells them apart.

Shapes: B windows, T steps, S latent size, H, W, C frame height, width and channels.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import agent, world_model
from drama_jax.agent import AgentState
from drama_jax.replay import Batch


@flax.struct.dataclass
class PredictionErrors:
    """Squared errors per pixel and channel of frames in 0..1, averaged over the pairs (t, t + 1) that count."""

    model: jax.Array  # [] float, the prior's mode
    copy: jax.Array  # [] float, the posterior's mode of the frame before
    reconstruction: jax.Array  # [] float, the posterior's mode of the frame itself: the floor of the other two
    pairs: jax.Array  # [] int32, how many pairs count; the errors are 0 if none does


def one_step_errors(
    state: AgentState, batch: Batch, *, context: int, order: jax.Array | None = None
) -> PredictionErrors:
    """Errors of one-step prediction on recorded windows, in evaluation mode; nothing is sampled.

    A pair counts if at least `context` steps of its window came before it, no episode starts at t + 1, and the frame
    changes from t to t + 1: where nothing moves, copying is right by definition.

    Args:
      state: whose world model to judge.
      batch: windows [B, T, ...], best of steps that the model was not trained on.
      context: steps at the start of a window that only warm the recurrent state up (static).
      order: [T] int, gives the sequence model its inputs in this order of time. A model whose error does not grow under
        a random order predicts nothing from the past.

    Returns:
      The errors, averaged over all pairs that count.
    """
    config, model = state.config, state.world_model
    posterior = world_model.posterior(config.world_model, model, batch.frames)
    latent = _mode(state, posterior)
    order = jnp.arange(latent.shape[1]) if order is None else order
    features, _ = world_model.observe(
        config.world_model,
        model.params,
        latent[:, order],
        batch.actions[:, order],
        num_actions=state.num_actions,
        segment_ids=agent.episode_segments(config.fidelity, batch.firsts),
    )
    predicted = _mode(state, world_model.prior(config.world_model, model.params, features[:, :-1]))
    seen = world_model.decode(config.world_model, model, latent)
    dreamt = world_model.decode(config.world_model, model, predicted)
    truth = batch.frames.astype(dreamt.dtype) / 255
    moves = jnp.any(batch.frames[:, 1:] != batch.frames[:, :-1], axis=(2, 3, 4))
    late = jnp.arange(moves.shape[1]) >= context
    counts = (moves & ~batch.firsts[:, 1:] & late).astype(truth.dtype)

    def error(frames: jax.Array) -> jax.Array:
        per_pair = jnp.square(frames - truth[:, 1:]).mean(axis=(2, 3, 4))
        return (per_pair * counts).sum() / jnp.maximum(counts.sum(), 1)

    return PredictionErrors(
        model=error(dreamt),
        copy=error(seen[:, :-1]),
        reconstruction=error(seen[:, 1:]),
        pairs=counts.sum().astype(jnp.int32),
    )


def _mode(state: AgentState, log_probs: jax.Array) -> jax.Array:
    """The most likely class of each categorical: [..., K, C] log-probabilities -> one-hot [..., S], compute dtype."""
    dtype = world_model.compute_dtype(state.config.world_model)
    one_hot = jax.nn.one_hot(log_probs.argmax(axis=-1), log_probs.shape[-1], dtype=dtype)
    return one_hot.reshape(*one_hot.shape[:-2], -1)
