"""Checkpoints of the agent through orbax: <run>/checkpoints/<step>/.

A checkpoint holds every leaf of `AgentState` except the replay, whose frames are far larger than all the rest. It is
written to a temporary directory and renamed, so a reader sees a whole checkpoint or none. Loading executes no code.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.config import ConfigError

State = TypeVar("State")
_KEPT = 2


class Checkpoints:
    """The checkpoints of one run; the last two are kept."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._manager = _manager(directory, create=True)

    def save(self, step: int, state: Any) -> None:
        """Saves `state` (an `AgentState`) less its replay; returns when it is on disk."""
        import orbax.checkpoint as ocp

        self._manager.save(step, args=ocp.args.StandardSave(_to_host(dataclasses.replace(state, replay=None))))

    def close(self) -> None:
        """Frees what the manager holds."""
        self._manager.close()


def restore(directory: pathlib.Path, state: State, step: int | None = None) -> State:
    """The checkpoint's leaves in the structure of `state`, which keeps its replay.

    Args:
      directory: <run>/checkpoints.
      state: An `AgentState` of the same configuration, for instance from `agent.init`.
      step: Which checkpoint; the newest if None.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    import orbax.checkpoint as ocp

    template = dataclasses.replace(state, replay=None)  # type: ignore[type-var]
    with _manager(directory) as manager:
        saved = manager.restore(_step(directory, manager, step), args=ocp.args.StandardRestore(_to_host(template)))
    restored = jax.tree.map(_from_host, template, saved)
    return dataclasses.replace(restored, replay=state.replay)  # type: ignore[type-var, attr-defined]


def load_weights(directory: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """The checkpoint as nested dicts of numpy arrays, for those who only want the model; needs no configuration.

    Args:
      directory: <run>/checkpoints.
      step: Which checkpoint; the newest if None.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    import orbax.checkpoint as ocp

    with _manager(directory) as manager:
        return manager.restore(_step(directory, manager, step), args=ocp.args.StandardRestore())


def _manager(directory: pathlib.Path, create: bool = False) -> Any:
    import orbax.checkpoint as ocp

    if not create and not directory.is_dir():
        raise ConfigError(f"no checkpoints at {directory}; name the checkpoints directory of a run")
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False, create=create)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _step(directory: pathlib.Path, manager: Any, step: int | None) -> int:
    steps = manager.all_steps()
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise ConfigError(f"no checkpoint{wanted} in {directory}; there: {sorted(steps) or 'none'}")
    return int(max(steps) if step is None else step)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(tree: Any) -> Any:
    """Copies to numpy, so that donated buffers may be reused; typed PRNG keys become their words."""
    words = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)
    return jax.tree.map(np.array, jax.device_get(words))


def _from_host(template: Any, saved: np.ndarray) -> jax.Array:
    if _is_key(template):
        return jax.random.wrap_key_data(jnp.asarray(saved), impl=jax.random.key_impl(template))
    return jnp.asarray(saved)
