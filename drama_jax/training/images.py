"""Pictures of what the world model sees and dreams, for the log."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from drama_jax import agent, replay
from drama_jax.training.logging import Writer, comparison_strip

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
