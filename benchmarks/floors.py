"""The least time that a stage can take on a card: its operations and its bytes, counted from the configuration.

Operations are those of the convolutions as they are written (5x5, without the zeros that the polyphase form adds) and
of all matrix products; one multiply-add is two operations. Bytes are activations in bfloat16 that must leave the chip:
written once and read once forward; backward the stored activation is read, its gradient written and read. The floor is
the larger of operations over the card's peak rate and bytes over its bandwidth, as if the two overlapped perfectly.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from benchmarks import common
from drama_jax.agent import AgentState
from drama_jax.config import AutoencoderConfig

BFLOAT16 = 2
TRAINING_PASSES = 3
"""Matrix products forward, by the input and by the weights."""
TRAINING_MOVES = 5


def floor_ms(flop: float, traffic: float) -> float | None:
    """Milliseconds for so many operations and bytes on this card; None if its ceilings are not known."""
    ceilings = common.CEILINGS.get(common.device_name())
    if ceilings is None:
        return None
    return 1e3 * max(flop / ceilings["bf16_flop_per_s"], traffic / ceilings["bytes_per_s"])


def size(*trees: Any) -> int:
    """Numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(trees))


def encoder_layers(config: AutoencoderConfig) -> list[tuple[float, float]]:
    """(multiply-adds, output numbers) per frame of each 5x5 convolution; the decoder mirrors them."""
    edge, channels, layers = config.image_size, config.image_channels, []
    for i, depth in enumerate(config.depths):
        edge = edge if i == 0 else edge // 2
        layers.append((float(edge * edge * 25 * channels * depth), float(edge * edge * depth)))
        channels = depth
    return layers


def work(state: AgentState) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of each stage."""
    config, im, wm = state.config, state.config.imagination, state.config.world_model
    autoencoder = wm.autoencoder
    multiplies, outputs = (sum(column) for column in zip(*encoder_layers(autoencoder)))
    pixels = float(math.prod(autoencoder.image_shape))
    model, networks = state.world_model.params, state.behaviour.params
    actor, critic = size(networks["actor"]), size(networks["critic"])

    trained = wm.batch_size * wm.batch_length
    dense = size(model) - size(model["encoder"], model["decoder"])
    training = (
        2.0 * TRAINING_PASSES * trained * (2 * multiplies + dense),
        trained * (2 * pixels + BFLOAT16 * TRAINING_MOVES * 2 * outputs),
    )
    frames = im.batch_size * im.context_length
    encoding = (2.0 * frames * multiplies, frames * pixels)
    steps, rows = im.batch_size * (im.context_length + im.horizon), im.batch_size * (im.horizon + 1)
    features = float(BFLOAT16 * rows * wm.feature_size)
    rollout = (
        2.0 * (steps * size(model["backbone"], model["prior_head"]) + im.batch_size * im.horizon * actor),
        features,
    )
    # Forward and backward of both networks, and the values of the slow critic.
    behaviour = (2.0 * rows * (TRAINING_PASSES * (actor + critic) + critic), 3 * features)
    acting = (2.0 * config.acting_context * multiplies, 2.0 * BFLOAT16 * (size(model) + actor))
    stages = {
        "sample starts": (0.0, 12.0 * config.replay.capacity),
        "gather context frames": (0.0, 2 * frames * pixels),
        "encode context frames": encoding,
        "encode and imagine": _sum(encoding, rollout),
        "behaviour update": behaviour,
        "world_model_update": training,
        "imagination_behaviour_update": _sum(encoding, rollout, behaviour),
        "act": acting,
    }
    stages["environment_step"] = _sum(training, stages["imagination_behaviour_update"])
    return stages


def _sum(*works: tuple[float, float]) -> tuple[float, float]:
    return sum(flop for flop, _ in works), sum(traffic for _, traffic in works)


def add(rows: list[dict[str, Any]], state: AgentState, time: str) -> None:
    """Adds `floor_ms` and `ratio` (of the field `time`) to rows whose name is a stage, on a card that is known."""
    counted = work(state)
    for row in rows:
        floor = floor_ms(*counted[row["name"]])
        if floor is not None:
            row |= {"floor_ms": floor, "ratio": row[time] / floor}
