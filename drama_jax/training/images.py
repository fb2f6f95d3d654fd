"""Pictures of what the world model sees and dreams, for the log."""

from __future__ import annotations

from typing import Any

import jax

from drama_jax import agent, replay
from drama_jax.training.logging import Writer, comparison_strip

_SEQUENCES_SHOWN = 3


def log(writer: Writer, step: int, state: Any, key: jax.Array) -> None:
    """A strip of reconstructions and one of an imagined rollout, from random windows of the replay.

    Args:
      writer: Where they go.
      step: Agent steps done.
      state: `AgentState`.
      key: PRNG key, consumed.
    """
    truth, reconstruction, video = jax.device_get(_pictures(state, key))
    seen = truth[:, : reconstruction.shape[1]]
    writer.image(step, "world_model/reconstruction", comparison_strip(seen, reconstruction))
    writer.image(step, "world_model/imagined_rollout", comparison_strip(truth, video))


@jax.jit
def _pictures(state: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(frames uint8 [B, context + horizon, H, W, C], reconstructions of the context, open-loop rollout)."""
    start_key, reconstruction_key, video_key = jax.random.split(key, 3)
    imagination = state.config.imagination
    context = imagination.context_length
    length = context + imagination.horizon
    starts = jax.random.randint(start_key, (_SEQUENCES_SHOWN,), 0, replay.num_starts(state.replay, length))
    batch = replay.gather(state.replay, starts, length)
    reconstruction = agent.reconstruct(state, batch.frames[:, :context], reconstruction_key)
    return batch.frames, reconstruction, agent.imagine_video(state, batch, video_key, context)
