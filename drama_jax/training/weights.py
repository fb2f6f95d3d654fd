"""The model alone as one .npz file: what is shared, published or evaluated elsewhere.

Arrays are named by their path, for example `world_model/params/encoder/...`. Nothing in the file is pickled.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from drama_jax import checks
from drama_jax.config import ConfigError
from drama_jax.training import arrays, files

State = TypeVar("State")
SUFFIX = ".npz"


def write(path: pathlib.Path, weights: Mapping[str, Any]) -> None:
    """Writes weights as from `checkpoint.load_weights`.

    Raises:
      ConfigError: if the file cannot be written, or is not named `.npz`.
    """
    checks.instances("weights.write", path=(path, pathlib.Path), weights=(weights, dict))
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path}: a file of weights is named *{SUFFIX}")
    try:
        files.write(path, files.pack(arrays.flatten(weights)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def read(path: pathlib.Path) -> dict[str, Any]:
    """The weights in a file, as nested dicts of numpy arrays. Executes nothing.

    Raises:
      ConfigError: if it cannot be read, or is no such file.
    """
    checks.instances("weights.read", path=(path, pathlib.Path))
    try:
        return arrays.nest(files.unpack(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no weights ({' '.join(str(error).split())})") from error


def of(state: Any) -> dict[str, Any]:
    """The weights of an `AgentState`, on the host."""
    return arrays.nest(arrays.to_host(_part(state)))


def into(state: State, weights: Mapping[str, Any]) -> State:
    """`state` with the weights in place of its own.

    Args:
      state: An `AgentState` of the same configuration and number of actions.
      weights: As from `read` or `checkpoint.load_weights`.

    Raises:
      ConfigError: an array is missing, or has another shape or type.
    """
    loaded = arrays.from_host(_part(state), arrays.flatten(weights))
    changed: dict[str, Any] = {
        name: dataclasses.replace(getattr(state, name), **loaded[name]) for name in ("world_model", "behaviour")
    }
    return dataclasses.replace(state, **changed)  # type: ignore[type-var]


def _part(state: Any) -> dict[str, Any]:
    model, behaviour = state.world_model, state.behaviour
    return {
        "world_model": {"params": model.params, "batch_stats": model.batch_stats},
        "behaviour": {"params": behaviour.params, "normaliser": behaviour.normaliser},
    }
