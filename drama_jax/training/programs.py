"""The compiled functions of the host loop, for one agent and for several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from drama_jax import action_space, agent, replay
from drama_jax.action_space import ActionSpace
from drama_jax.config import AgentConfig
from drama_jax.training import images
from drama_jax.training.together import Together

Program = Callable[..., Any]


def _transition(*arrays: jax.Array) -> replay.Transition:
    return replay.Transition(*(array[0] for array in arrays))


def shapes(config: AgentConfig, num_actions: ActionSpace) -> Any:
    """What `initial_state` would return, as shapes and types."""
    return jax.eval_shape(lambda key: agent.init(key, config, num_actions), jax.random.key(0))


def initial_state(key: jax.Array, config: AgentConfig, num_actions: ActionSpace) -> Any:
    """`agent.init` as one compiled program; run once, so that on a CPU it is compiled fast rather than well."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(agent.init, static_argnums=(1, 2), compiler_options=options)(key, config, num_actions)


def _act(state: Any, acting: Any, frames: jax.Array, key: jax.Array, step: int, first: jax.Array) -> Any:
    """Sampled action; the key of a step is derived from the run's by the step's number."""
    return agent.act(state, acting, frames, jax.random.fold_in(key, step), first)


def _observe(state: Any, *arrays: jax.Array) -> Any:
    return agent.observe(state, _transition(*arrays))


def _update(state: Any, *arrays: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    return agent.update(state, _transition(*arrays))


# With the context donated, arrays stay where they were in the call before, and less of the CUDA graph is rewritten.
act = jax.jit(_act, donate_argnums=1)
observe = jax.jit(_observe, donate_argnums=0)
update = jax.jit(_update, donate_argnums=0)


@jax.jit
def _state_metrics(state: Any) -> dict[str, jax.Array]:
    return agent.state_metrics(state)


class Programs:
    """The compiled functions of a loop. Frames [N, ...], actions and flags [N] become E = 1 for each agent."""

    def __init__(self, together: Together) -> None:
        self.player: Program = agent.player  # not compiled: what `act` is given of a state
        self.act: Program = act
        self.observe: Program = observe
        self.update: Program = update
        self.metrics: Program = _state_metrics
        self.pictures: Program = images.pictures
        if together.count > 1:
            self.act = together.program(_act_one, shared=(4,), donated=1)
            self.observe = together.program(_observe_one, donated=0)
            self.update = together.program(_update_one, donated=0)
            self.metrics = together.program(_state_metrics)
            self.pictures = together.program(images.pictures)


def update_bytes(config: AgentConfig, num_actions: ActionSpace, together: Together) -> tuple[int, int] | None:
    """What `Programs.update` takes of each device, by the compiled program's own account; nothing is allocated.

    Compiles it, as the loop will call it: JAX keeps the program for that call, so that it is not compiled twice.

    Args:
      config: Of every agent.
      num_actions: A of the game, or `Continuous(A)`.
      together: How the agents lie on the devices.

    Returns:
      Bytes of the states, and of all that is in memory while the update runs; None if the compiler gives no account.
    """
    several = together.count > 1
    sharding = together.sharding if several else None

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((together.count, *leaf.shape), leaf.dtype, sharding=sharding)

    state = shapes(config, num_actions)
    actions = jax.eval_shape(lambda: action_space.zeros(num_actions, (together.count,)))
    columns = [actions, *(jax.ShapeDtypeStruct((together.count,), dtype) for dtype in (jnp.float32, bool, bool))]
    autoencoder = config.world_model.autoencoder
    frame = stacked(jax.ShapeDtypeStruct(autoencoder.frame_shape, autoencoder.frame_dtype))
    if several:
        lowered = together.lowered(_update_one, jax.tree.map(stacked, state), frame, *columns, donated=0)
    else:
        lowered = update.lower(state, frame, *columns)
    memory = lowered.compile().memory_analysis()
    if memory is None:
        return None
    states = memory.argument_size_in_bytes
    return states, states + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _act_one(state: Any, acting: Any, frame: jax.Array, key: jax.Array, step: int, first: jax.Array) -> Any:
    actions, acting = _act(state, acting, frame[None], key, step, first[None])
    return actions[0], acting


def _observe_one(state: Any, *arrays: jax.Array) -> Any:
    return agent.observe(state, replay.Transition(*arrays))


def _update_one(state: Any, *arrays: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    return agent.update(state, replay.Transition(*arrays))
