"""Pictures of what the world model sees and dreams, for the log."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from drama_jax import agent, replay
from drama_jax.training.logging import Writer

_SEQUENCES_SHOWN = 3


def write(writer: Writer, step: int, truth: np.ndarray, reconstruction: np.ndarray, video: np.ndarray) -> None:
    """A strip of reconstructions and one of an imagined rollout, from what `pictures` returns, on the host.

    Args:
      writer: Where they go.
      step: Agent steps done.
      truth: uint8 [B, context + horizon, H, W, C].
      reconstruction: In 0..1 [B, context, H, W, C].
      video: In 0..1, of the shape of `truth`.
    """
    seen = truth[:, : reconstruction.shape[1]]
    writer.image(step, "world_model/reconstruction", comparison_strip(seen, reconstruction))
    writer.image(step, "world_model/imagined_rollout", comparison_strip(truth, video))


def comparison_strip(truth: np.ndarray, prediction: np.ndarray, gap: int = 2) -> np.ndarray:
    """Frames over their predictions over the absolute error, time from left to right.

    Args:
      truth: uint8 [B, T, H, W, C], C = 1 or 3.
      prediction: float [B, T, H, W, C] in [0, 1].
      gap: Pixels between frames; twice as many between sequences.

    Returns:
      uint8 [B * (3 (H + gap) + gap), T * (W + gap), 3].
    """
    predicted = np.clip(np.rint(prediction * 255.0), 0, 255).astype(np.uint8)
    error = np.abs(truth.astype(np.int16) - predicted).astype(np.uint8)
    rows = np.stack([truth, predicted, error], axis=1)
    rows = np.broadcast_to(rows, (*rows.shape[:-1], 3))
    rows = np.pad(rows, [(0, 0)] * 3 + [(0, gap)] * 2 + [(0, 0)])
    b, three, t, h, w, c = rows.shape
    sequences = rows.transpose(0, 1, 3, 2, 4, 5).reshape(b, three * h, t * w, c)
    return np.pad(sequences, [(0, 0), (0, gap), (0, 0), (0, 0)]).reshape(-1, t * w, c)


@jax.jit
def pictures(state: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random windows of the replay, reconstructions of their context, and an open-loop rollout.

    Args:
      state: `AgentState`.
      key: PRNG key, consumed.

    Returns:
      Frames uint8 [B, context + horizon, H, W, C], and in 0..1 [B, context, ...] and [B, context + horizon, ...].
    """
    start_key, reconstruction_key, video_key = jax.random.split(key, 3)
    imagination = state.config.imagination
    context = imagination.context_length
    length = context + imagination.horizon
    starts = jax.random.randint(start_key, (_SEQUENCES_SHOWN,), 0, replay.num_starts(state.replay, length))
    batch = replay.gather(state.replay, starts, length)
    reconstruction = agent.reconstruct(state, batch.frames[:, :context], reconstruction_key)
    return batch.frames, reconstruction, agent.imagine_video(state, batch, video_key, context)
