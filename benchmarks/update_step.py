"""Milliseconds of each stage of one environment step, and of the whole.

    python -m benchmarks.update_step --preset xs
    python -m benchmarks.update_step --preset xs --backbone rwkv --behaviour ppo
    python -m benchmarks.update_step --preset xs --actions 4

Stages are timed twice: `median_ms` waits for the device after every call (dispatch included), `queued_ms` queues
calls as the training loop does. Frames are random; the time does not depend on what they show. `floor_ms` is explained
in `benchmarks/floors.py`; it is counted for Mamba-2 and the actor-critic.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, floors
from drama_jax import agent, replay
from drama_jax.config import PRESETS, BackboneName, BehaviourName, preset
from experiments import machine

ACTIONS = 18


def filled_state(config: Any, stored: int, num_actions: int = ACTIONS) -> agent.AgentState:
    """An agent of a game with `num_actions` actions, whose replay holds `stored` random steps."""
    state = jax.jit(agent.init, static_argnums=(1, 2))(jax.random.key(0), config, num_actions)
    rng = np.random.default_rng(0)
    n = state.replay.capacity
    memory = dataclasses.replace(
        state.replay,
        frames=jax.random.bits(jax.random.key(1), state.replay.frames.shape, jnp.uint8),
        actions=jnp.asarray(rng.integers(0, num_actions, n), jnp.int32),
        rewards=jnp.asarray(rng.integers(0, 2, n), jnp.float32),
        firsts=jnp.asarray(rng.random(n) < 1e-3),
        position=jnp.asarray(stored % n, jnp.int32),
        size=jnp.asarray(stored, jnp.int32),
    )
    return dataclasses.replace(state, replay=memory)


def stages(state: agent.AgentState) -> dict[str, Any]:
    """Name -> function of the state that returns a new state (donated) or a result."""
    shape = state.config.world_model.autoencoder.image_shape
    transition = replay.Transition(
        frame=jnp.zeros(shape, jnp.uint8),
        action=jnp.zeros((), jnp.int32),
        reward=jnp.zeros((), jnp.float32),
        terminal=jnp.zeros((), bool),
        first=jnp.zeros((), bool),
    )
    donate = functools.partial(jax.jit, donate_argnums=0)
    return {
        "world_model_update": donate(agent.train_world_model),
        "imagination_behaviour_update": donate(agent.train_behaviour),
        "environment_step": donate(lambda s: agent.update(s, transition)),
    }


def timed_stages(state: agent.AgentState, preset_name: str, repeats: int) -> tuple[agent.AgentState, list[dict]]:
    """Rows of all stages; the state is threaded through because it is donated."""
    rows = []
    holder = [state]
    for name, function in stages(state).items():
        start = time.perf_counter()
        compiled = function.lower(holder[0]).compile()
        compile_s = time.perf_counter() - start

        def call(compiled: Any = compiled) -> Any:
            holder[0], metrics = compiled(holder[0])
            return metrics

        memory = compiled.memory_analysis()
        rows.append(
            {
                "name": name,
                "preset": preset_name,
                "median_ms": common.median_ms(call, repeats),
                "queued_ms": common.queued_ms(call, repeats),
                "compile_s": compile_s,
                "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
            }
        )
        print(rows[-1], flush=True)
    state = holder[0]
    rows.append(timed_act(state, preset_name, repeats))
    print(rows[-1], flush=True)
    return state, rows


def timed_act(state: agent.AgentState, preset_name: str, repeats: int) -> dict[str, Any]:
    """`act` for one environment as the loop calls it: the frame sent to the device, the action fetched."""
    act, player = jax.jit(agent.act, donate_argnums=1), agent.player(state)
    holder = [agent.initial_acting(state, 1), jax.random.key(2)]
    frame = np.zeros((1, *state.config.world_model.autoencoder.image_shape), np.uint8)
    first = jax.device_put(np.zeros(1, bool))

    def call() -> np.ndarray:
        actions, holder[0] = act(player, holder[0], frame, holder[1], first)
        actions.copy_to_host_async()
        return np.asarray(actions)

    return {
        "name": "act",
        "preset": preset_name,
        "median_ms": common.median_ms(call, repeats),
        "queued_ms": common.queued_ms(call, repeats),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--backbone", choices=typing.get_args(BackboneName), default="mamba2")
    parser.add_argument("--behaviour", choices=typing.get_args(BehaviourName), default="actor_critic")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--stored", type=int, default=20_000, help="steps in the replay")
    parser.add_argument("--actions", type=int, default=ACTIONS, help="of the game; the bars are for all 18")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="directory of the result file")
    arguments = parser.parse_args()
    machine.set_xla_flags(deterministic=False)  # as a run does
    config = preset(arguments.preset, arguments.backbone, arguments.behaviour).agent
    state = filled_state(config, min(arguments.stored, config.replay.capacity), arguments.actions)
    state, rows = timed_stages(state, arguments.preset, arguments.repeats)
    if (arguments.backbone, arguments.behaviour) == ("mamba2", "actor_critic"):
        floors.add(rows, state, "median_ms")
    else:
        rows = [row | {"backbone": arguments.backbone, "behaviour": arguments.behaviour} for row in rows]
    rows = [row | {"actions": arguments.actions} for row in rows]
    common.write_result("update_step", rows, arguments.out)


if __name__ == "__main__":
    main()
