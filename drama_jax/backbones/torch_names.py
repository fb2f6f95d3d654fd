"""The released PyTorch names of the Mamba-2 sequence model, and the way from and to its arrays.

A pure renaming and transposition, so that it serves parameters, gradients and parameter changes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drama_jax import checks

PREFIX = "sequence_model.backbone."

_Layout = Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.T


def _conv_from_torch(array: np.ndarray) -> np.ndarray:
    return array[:, 0, :].T  # [V, 1, W] -> [W, V]


def _conv_to_torch(array: np.ndarray) -> np.ndarray:
    return array.T[:, None, :]


# torch name -> (path in our tree, layout from torch, layout to torch)
_MIXER: dict[str, tuple[tuple[str, ...], _Layout, _Layout]] = {
    "dt_bias": (("dt_bias",), _same, _same),
    "A_log": (("A_log",), _same, _same),
    "D": (("D",), _same, _same),
    "in_proj.weight": (("in_proj", "kernel"), _transposed, _transposed),
    "conv1d.weight": (("conv", "kernel"), _conv_from_torch, _conv_to_torch),
    "conv1d.bias": (("conv", "bias"), _same, _same),
    "norm.weight": (("norm", "scale"), _same, _same),
    "out_proj.weight": (("out_proj", "kernel"), _transposed, _transposed),
}


_SHAPES: dict[_Layout, checks.Shape] = {
    _same: ("size",),
    _transposed: ("out", "in"),
    _conv_from_torch: ("channels", 1, "width"),
}


def _table(num_layers: int) -> dict[str, tuple[tuple[str, ...], _Layout, _Layout]]:
    table: dict[str, tuple[tuple[str, ...], _Layout, _Layout]] = {
        "stem.0.weight": (("stem", "kernel"), _transposed, _transposed),
        "stem.0.bias": (("stem", "bias"), _same, _same),
        "stem.1.scale": (("stem", "norm", "scale"), _same, _same),
        "norm_f.weight": (("norm_f", "scale"), _same, _same),
    }
    for i in range(num_layers):
        table[f"layers.{i}.norm.weight"] = ((f"layers_{i}", "norm", "scale"), _same, _same)
        for name, (path, load, save) in _MIXER.items():
            table[f"layers.{i}.mixer.{name}"] = ((f"layers_{i}", "mixer", *path), load, save)
    return table


def mixer_from_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree of one `Mamba2Mixer` from arrays named as in `mixer.<name>`."""
    return _build({name: (path, load) for name, (path, load, _) in _MIXER.items()}, arrays)


def from_torch(arrays: Mapping[str, np.ndarray], *, num_layers: int, prefix: str = PREFIX) -> dict[str, Any]:
    """The params tree of `Mamba2Backbone` from arrays under their released names.

    Args:
      arrays: name -> array, in PyTorch's layouts; parameters, gradients or changes. Names without `prefix` are ignored.
      num_layers: number of layers.
      prefix: what the names begin with; the released checkpoints' by default.

    Returns:
      The nested dict that goes under "params".

    Raises:
      ValueError: if an array is missing, has another number of axes, or one under `prefix` is not part of the model.
    """
    own = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
    return _build({name: (path, load) for name, (path, load, _) in _table(num_layers).items()}, own)


def to_torch(params: Mapping[str, Any], *, num_layers: int, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`."""
    arrays = {}
    for name, (path, _, save) in _table(num_layers).items():
        node: Any = params
        for key in path:
            node = node[key]
        arrays[prefix + name] = save(np.asarray(node))
    return arrays


def _build(table: Mapping[str, tuple[tuple[str, ...], _Layout]], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    missing, unknown = table.keys() - arrays.keys(), arrays.keys() - table.keys()
    if missing or unknown:
        raise ValueError(f"sequence model weights: missing {sorted(missing)}, not part of the model {sorted(unknown)}")
    tree: dict[str, Any] = {}
    for name, (path, load) in table.items():
        array = np.asarray(arrays[name])
        checks.arrays("sequence model weights", **{name: (array, _SHAPES[load], "any")})
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = load(array)
    return tree
