"""The released PyTorch names of the sequence models, and the way from and to their arrays.

A pure renaming and transposition, so that it serves parameters, gradients and parameter changes alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from drama_jax import checks

PREFIX = "sequence_model.backbone."

_Layout = Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _as_matrix(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.T


def _conv_from_torch(array: np.ndarray) -> np.ndarray:
    return array[:, 0, :].T  # [V, 1, W] -> [W, V]


def _conv_to_torch(array: np.ndarray) -> np.ndarray:
    return array.T[:, None, :]


_Entry = tuple[tuple[str, ...], _Layout, _Layout]
_Table = dict[str, _Entry]
Backbone = Literal["mamba2", "mamba", "transformer"]


def _vector(*path: str) -> _Entry:
    return path, _same, _same


def _linear(*path: str) -> _Entry:
    return (*path, "kernel"), _transposed, _transposed


_CONV: _Table = {
    "conv1d.weight": (("conv", "kernel"), _conv_from_torch, _conv_to_torch),
    "conv1d.bias": _vector("conv", "bias"),
}
# torch name -> (path in our tree, layout from torch, layout to torch)
_MIXERS: dict[str, _Table] = {
    "mamba2": {
        "dt_bias": _vector("dt_bias"),
        "A_log": _vector("A_log"),
        "D": _vector("D"),
        "in_proj.weight": _linear("in_proj"),
        **_CONV,
        "norm.weight": _vector("norm", "scale"),
        "out_proj.weight": _linear("out_proj"),
    },
    "mamba": {
        "A_log": (("A_log",), _as_matrix, _as_matrix),
        "D": _vector("D"),
        "in_proj.weight": _linear("in_proj"),
        **_CONV,
        "x_proj.weight": _linear("x_proj"),
        "dt_proj.weight": _linear("dt_proj"),
        "dt_proj.bias": _vector("dt_bias"),
        "out_proj.weight": _linear("out_proj"),
    },
}
_TRANSFORMER_BLOCK: _Table = {
    "slf_attn.w_qs.weight": _linear("query"),
    "slf_attn.w_ks.weight": _linear("key"),
    "slf_attn.w_vs.weight": _linear("value"),
    "slf_attn.fc.weight": _linear("out"),
    "slf_attn.layer_norm.weight": _vector("norm_attention", "scale"),
    "slf_attn.layer_norm.bias": _vector("norm_attention", "bias"),
    "pos_ffn.w_1.weight": _linear("hidden"),
    "pos_ffn.w_1.bias": _vector("hidden", "bias"),
    "pos_ffn.w_2.weight": _linear("project"),
    "pos_ffn.w_2.bias": _vector("project", "bias"),
    "pos_ffn.layer_norm.weight": _vector("norm", "scale"),
    "pos_ffn.layer_norm.bias": _vector("norm", "bias"),
}


_SHAPES: dict[_Layout, checks.Shape] = {
    _same: ("size",),
    _as_matrix: ("rows", "columns"),
    _transposed: ("out", "in"),
    _conv_from_torch: ("channels", 1, "width"),
}


def _table(num_layers: int, backbone: Backbone) -> _Table:
    if backbone == "transformer":
        table: _Table = {
            "stem.0.weight": (("stem", "kernel"), _transposed, _transposed),
            "stem.1.weight": _vector("stem", "norm", "scale"),
            "stem.1.bias": _vector("stem", "norm", "bias"),
            "stem.3.weight": _linear("stem", "out"),
            "stem.4.weight": _vector("stem", "norm_out", "scale"),
            "stem.4.bias": _vector("stem", "norm_out", "bias"),
            "position_encoding.pos_emb.weight": (("positions",), _as_matrix, _as_matrix),
            "layer_norm.weight": _vector("norm", "scale"),
            "layer_norm.bias": _vector("norm", "bias"),
        }
        blocks = _TRANSFORMER_BLOCK
    else:
        table = {
            "stem.0.weight": (("stem", "kernel"), _transposed, _transposed),
            "stem.0.bias": _vector("stem", "bias"),
            "stem.1.scale": _vector("stem", "norm", "scale"),
            "norm_f.weight": _vector("norm_f", "scale"),
        }
        blocks = _MIXERS[backbone]
    for i in range(num_layers):
        if backbone != "transformer":
            table[f"layers.{i}.norm.weight"] = _vector(f"layers_{i}", "norm", "scale")
        for name, (path, load, save) in blocks.items():
            if backbone == "transformer":
                table[f"layer_stack.{i}.{name}"] = ((f"layers_{i}", *path), load, save)
            else:
                table[f"layers.{i}.mixer.{name}"] = ((f"layers_{i}", "mixer", *path), load, save)
    return table


def mixer_from_torch(
    arrays: Mapping[str, np.ndarray], backbone: Literal["mamba2", "mamba"] = "mamba2"
) -> dict[str, Any]:
    """The tree of one `Mamba2Mixer` or `MambaMixer` from arrays named as in `mixer.<name>`."""
    return _build({name: (path, load) for name, (path, load, _) in _MIXERS[backbone].items()}, arrays)


def recognise(names: Iterable[str]) -> Backbone:
    """Which sequence model has arrays of these names, relative to it (`backbone.stem.0.weight`, ...)."""
    if any(re.match(r"layer_stack\.|position_encoding\.|stem\.", name) for name in names):
        return "transformer"
    return "mamba" if any(re.search(r"\.mixer\.(x|dt)_proj\.", name) for name in names) else "mamba2"


def from_torch(
    arrays: Mapping[str, np.ndarray], *, num_layers: int, prefix: str = PREFIX, backbone: Backbone = "mamba2"
) -> dict[str, Any]:
    """The params tree of a backbone from arrays under their released names.

    Args:
      arrays: name -> array, in PyTorch's layouts; parameters, gradients or changes. Names without `prefix` are ignored.
      num_layers: number of layers.
      prefix: what the names begin with; by default that of the released checkpoints with a Mamba.
      backbone: which one; `transformer` has no `backbone.` in its names.

    Returns:
      The nested dict that goes under "params".

    Raises:
      ValueError: if an array is missing, has another number of axes, or one under `prefix` is not part of the model.
    """
    own = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
    return _build({name: (path, load) for name, (path, load, _) in _table(num_layers, backbone).items()}, own)


def to_torch(
    params: Mapping[str, Any], *, num_layers: int, prefix: str = PREFIX, backbone: Backbone = "mamba2"
) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`."""
    arrays = {}
    for name, (path, _, save) in _table(num_layers, backbone).items():
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
