"""Milliseconds of each part of imagination and behaviour learning, one after the other, for one preset.

    python -m benchmarks.imagination --preset xs

Every part is compiled alone and fed with the outputs of the one before, so the sum is above the time of the whole,
which XLA compiles as one program (`all`). `floor_ms` counts, for each part, the bytes of its inputs and outputs or its
matrix products, whichever takes longer on this card; the state between two imagined steps is not counted, because a
perfect kernel would not write it.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import common, update_step
from drama_jax import agent, replay, world_model
from drama_jax.behaviour import actor_critic
from drama_jax.config import PRESETS, preset


def parts(state: agent.AgentState) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(name, function, arguments) of each part."""
    config, im = state.config, state.config.imagination
    key = jax.random.key(0)

    def sample(state: agent.AgentState, key: jax.Array) -> Any:
        return replay.sample_imagination(
            config.replay,
            state.replay,
            key,
            im.batch_size,
            im.context_length,
            ratio=im.batch_size / config.world_model.batch_size,
            tau=state.hyper.imagination_tau,
        )[0]

    def gather(memory: replay.Replay, starts: jax.Array) -> replay.Batch:
        return replay.gather(memory, starts, im.context_length)

    def encode(state: agent.AgentState, batch: replay.Batch) -> jax.Array:
        return world_model.posterior(config.world_model, state.world_model, batch.frames)

    def imagine(state: agent.AgentState, batch: replay.Batch, key: jax.Array) -> agent.Imagined:
        return agent.imagine(state, batch, key)[0]

    def behaviour(state: agent.AgentState, imagined: agent.Imagined) -> Any:
        return actor_critic.update(
            config.behaviour,
            config.fidelity,
            state.behaviour,
            imagined.features,
            imagined.actions,
            imagined.rewards,
            imagined.terminations,
            learning_rate=state.hyper.behaviour_learning_rate,
            entropy_scale=state.hyper.entropy_scale,
        )[0]

    starts = jax.jit(sample)(state, key)
    batch = jax.jit(gather)(state.replay, starts)
    imagined = jax.jit(imagine)(state, batch, key)
    return [
        ("sample starts", sample, (state, key)),
        ("gather context frames", gather, (state.replay, starts)),
        ("encode context frames", encode, (state, batch)),
        ("encode and imagine", imagine, (state, batch, key)),
        ("behaviour update", behaviour, (state, imagined)),
    ]


def work(state: agent.AgentState) -> dict[str, tuple[float, float]]:
    """(operations, bytes) of each part, from its sizes; one multiply-add is two operations."""
    config, im = state.config, state.config.imagination
    wm = config.world_model
    frames = im.batch_size * im.context_length
    frame_bytes = float(math.prod(wm.autoencoder.image_shape))
    encoder = 2.0 * frames * encoder_multiplies(wm.autoencoder)

    def size(*trees: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(trees))

    model, networks = state.world_model.params, state.behaviour.params
    actor, critic = size(networks["actor"]), size(networks["critic"])
    steps = im.batch_size * (im.context_length + im.horizon)
    rolled = im.batch_size * im.horizon
    rows = im.batch_size * (im.horizon + 1)
    imagination = 2.0 * (steps * size(model["backbone"], model["prior_head"]) + rolled * actor)
    features = 2.0 * rows * wm.feature_size  # bytes in bfloat16
    training = 2.0 * rows * (3 * (actor + critic) + critic)  # forward and backward, and the slow critic's values
    counters = 4.0 * config.replay.capacity
    return {
        "sample starts": (0.0, 3 * counters),
        "gather context frames": (0.0, 2 * frames * frame_bytes),
        "encode context frames": (encoder, frames * frame_bytes),
        "encode and imagine": (encoder + imagination, frames * frame_bytes + features),
        "behaviour update": (training, 3 * features),
    }


def encoder_multiplies(config: Any) -> float:
    """Multiply-adds of the encoder's 5x5 convolutions for one frame, without those of the polyphase form."""
    size, channels, total = config.image_size, config.image_channels, 0.0
    for i, depth in enumerate(config.depths):
        size = size if i == 0 else size // 2
        total += size * size * 25 * channels * depth
        channels = depth
    return total


def rows(state: agent.AgentState, preset_name: str, repeats: int) -> list[dict[str, Any]]:
    """One row per part."""
    counted, ceilings, out = work(state), common.CEILINGS.get(common.device_name()), []
    for name, function, arguments in parts(state):
        jitted = jax.jit(function)
        row = {
            "name": name,
            "preset": preset_name,
            "queued_ms": common.queued_ms(lambda jitted=jitted, arguments=arguments: jitted(*arguments), repeats),
        }
        if ceilings:
            flop, traffic = counted[name]
            floor = 1e3 * max(flop / ceilings["bf16_flop_per_s"], traffic / ceilings["bytes_per_s"])
            row |= {"floor_ms": floor, "ratio": row["queued_ms"] / floor}
        out.append(row)
        print(row, flush=True)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--stored", type=int, default=20_000, help="steps in the replay")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    config = preset(arguments.preset).agent
    state = update_step.filled_state(config, min(arguments.stored, config.replay.capacity))
    common.write_result("imagination", rows(state, arguments.preset, arguments.repeats), arguments.out)


if __name__ == "__main__":
    main()
