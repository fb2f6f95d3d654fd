"""Milliseconds of each part of imagination and behaviour learning, one after the other, for one preset.

    python -m benchmarks.imagination --preset xs

Every part is compiled alone and fed with the outputs of the one before, so the sum is above the time of the whole,
which XLA compiles as one program. `floor_ms` is explained in `benchmarks/floors.py`.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import common, floors, update_step
from drama_jax import agent, replay, world_model
from drama_jax.behaviour import actor_critic
from drama_jax.config import PRESETS, preset
from experiments import machine


def parts(state: agent.AgentState) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(name, function, arguments) of each part."""
    config, im = state.config, state.config.imagination
    key = jax.random.key(0)

    def sample(state: agent.AgentState, key: jax.Array) -> jax.Array:
        return agent.sample_contexts(state, key)[0]

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


def rows(state: agent.AgentState, preset_name: str, repeats: int) -> list[dict[str, Any]]:
    """One row per part."""
    out = []
    for name, function, arguments in parts(state):
        run = functools.partial(jax.jit(function), *arguments)
        out.append({"name": name, "preset": preset_name, "queued_ms": common.queued_ms(run, repeats)})
    floors.add(out, state, "queued_ms")
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--stored", type=int, default=20_000, help="steps in the replay")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    machine.set_xla_flags(deterministic=False)  # as a run does
    config = preset(arguments.preset).agent
    state = update_step.filled_state(config, min(arguments.stored, config.replay.capacity))
    common.write_result("imagination", rows(state, arguments.preset, arguments.repeats), arguments.out)


if __name__ == "__main__":
    main()
