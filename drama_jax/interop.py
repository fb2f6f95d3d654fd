"""Weights of the released PyTorch Drama, as plain arrays by name, into this package's parameter trees.

The names are those of the released state dicts; nothing here needs PyTorch:

    arrays = {name: tensor.numpy() for name, tensor in torch.load(path).items()}
    variables = interop.from_torch(arrays)

PyTorch flattens feature maps channel-first and keeps linear weights as (out, in); both are rearranged. The mapping is
linear, so it serves gradients and parameter differences as well as parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from drama_jax import checks
from drama_jax.backbones import torch_names as backbone_names
from drama_jax.behaviour import torch_names as behaviour_names

Arrays = Mapping[str, np.ndarray]
Tree = dict[str, Any]

CONV_AXES = (2, 3, 1, 0)  # Conv2d (out, in, row, column) -> (row, column, in, out)
CONV_TRANSPOSE_AXES = (2, 3, 0, 1)  # ConvTranspose2d (in, out, row, column) -> the same


class _Group(dict[str, np.ndarray]):
    """The arrays whose names begin with `head`, by the rest of the name; knows which were asked for."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head, self.used = head, set[str]()

    def __getitem__(self, name: str) -> np.ndarray:
        self.used.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"from_torch: {self.head}.{name} is missing")

    def any_of(self, *names: str) -> bool:
        """Whether one of them is there."""
        return any(name in self for name in names)

    def fitting(self, **shapes: checks.Shape) -> list[np.ndarray]:
        """The arrays of these names, of these shapes; letters are sizes that must agree."""
        found = {name: self[name] for name in shapes}
        checks.arrays("from_torch", **{f"{self.head}.{name}": (found[name], shapes[name], "any") for name in shapes})
        return list(found.values())


def from_torch(arrays: Arrays) -> Tree:
    """Variables from a released state dict of the world model, of the agent, or of both together.

    Args:
      arrays: parameter name -> array, with the names of the released code (`encoder.backbone.0.weight`, ...).

    Returns:
      A dict with those of the following that the names speak of: `params` and `batch_stats` of
      `world_model.WorldModelState`; `actor`, `critic` and `slow_critic` as in `behaviour`. Arrays keep their dtype.

    Raises:
      TypeError: if `arrays` is no such mapping.
      ValueError: if a name is not known, one is missing, or an array does not fit another; the message names them.
    """
    if not isinstance(arrays, Mapping) or not all(isinstance(name, str) for name in arrays):
        raise TypeError(f"from_torch: arrays must be a mapping from names to arrays, got a {type(arrays).__name__}")
    groups: dict[str, _Group] = {}
    for name, array in arrays.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, _Group(head))[rest] = np.asarray(array)
    known = {"encoder", "dist_head", "image_decoder", "sequence_model", "reward_decoder", "termination_decoder"}
    agent = {"actor", "critic", "slow_critic"}
    unknown = sorted(set(groups) - known - agent - {"symlog_twohot_loss_func"})
    if unknown:
        _refuse(name for name in arrays if name.partition(".")[0] in unknown)
    variables: Tree = {}
    if set(groups) & known:
        variables["params"], variables["batch_stats"] = _world_model(groups)
        known -= {"sequence_model"}  # looks after its own names
        _refuse(
            f"{group.head}.{name}"
            for group in groups.values()
            for name in group.keys() - group.used
            if group.head in known and not name.endswith("num_batches_tracked")
        )
    for name in agent & set(groups):
        variables[name] = behaviour_names.from_torch(groups[name])
    return variables


def _refuse(names: Iterable[str]) -> None:
    unknown = sorted(names)
    if unknown:
        raise ValueError(f"from_torch knows no array named {', '.join(unknown[:3])}; expected released Drama names")


def _world_model(groups: dict[str, _Group]) -> tuple[Tree, Tree]:
    params: Tree = {}
    batch_stats: Tree = {}
    channels = 0
    if "encoder" in groups:
        params["encoder"], batch_stats["encoder"], channels = _encoder(groups["encoder"])
    if "dist_head" in groups:
        heads = groups["dist_head"]
        if heads.any_of("post_head.weight", "post_head.bias"):
            head = _linear(heads, "post_head")
            if not channels:
                raise ValueError("from_torch: dist_head.post_head needs the parameters of the encoder beside it")
            params["posterior_head"] = head | {"kernel": _channels_last(head["kernel"], channels, axis=0)}
        params["prior_head"] = _linear(heads, "prior_head")
    if "image_decoder" in groups:
        params["decoder"], batch_stats["decoder"] = _decoder(groups["image_decoder"])
    if "sequence_model" in groups:
        group = groups["sequence_model"]
        backbone = backbone_names.recognise(group)
        layers = {match[1] for name in group if (match := re.match(r"(?:backbone\.layers|layer_stack)\.(\d+)\.", name))}
        prefix = "" if backbone == "transformer" else "backbone."
        params["backbone"] = backbone_names.from_torch(group, num_layers=len(layers), prefix=prefix, backbone=backbone)
    for ours, theirs in (("reward_head", "reward_decoder"), ("termination_head", "termination_decoder")):
        if theirs in groups:
            hidden = _linear(groups[theirs], "backbone.0")
            size = len(hidden["bias"])
            (scale,) = groups[theirs].fitting(**{"backbone.1.scale": (size,)})
            params[ours] = {"hidden": hidden, "norm": {"scale": scale}, "output": _linear(groups[theirs], "head")}
    return params, batch_stats


def _layers(group: Arrays) -> list[int]:
    """Indices of the released `nn.Sequential` that hold parameters, in order."""
    return sorted({int(match[1]) for name in group if (match := re.match(r"backbone\.(\d+)\.", name))})


def _linear(group: _Group, name: str) -> Tree:
    weight, bias = group.fitting(**{f"{name}.weight": ("out", "in"), f"{name}.bias": ("out",)})
    return {"kernel": weight.T, "bias": bias}


def _norm(group: _Group, index: int) -> tuple[Tree, Tree]:
    """(parameters, running statistics) of a batch norm; either is empty if the state dict lacks it."""
    found = []
    for ours, theirs in ((("scale", "bias"), ("weight", "bias")), (("mean", "var"), ("running_mean", "running_var"))):
        names = [f"backbone.{index}.{name}" for name in theirs]
        there = group.any_of(*names)
        found.append(dict(zip(ours, group.fitting(**dict.fromkeys(names, ("C",))))) if there else {})
    return found[0], found[1]


def _conv(group: _Group, index: int, axes: tuple[int, ...], *, needed: bool, **known: int) -> Tree:
    """A 5x5 convolution; empty if it is not `needed` and not there, as in a dict of running statistics only.

    Args:
      known: sizes of its `inputs` and `outputs`, where its neighbours tell.
    """
    name = f"backbone.{index}"
    if not needed and not group.any_of(f"{name}.weight", f"{name}.bias"):
        return {}
    into, out = known.get("inputs", "in"), known.get("outputs", "out")
    shape: checks.Shape = (out, into, 5, 5) if axes == CONV_AXES else (into, out, 5, 5)
    weight, bias = group.fitting(**{f"{name}.weight": shape, f"{name}.bias": (out,)})
    return {"kernel": weight.transpose(axes), "bias": bias}


def _encoder(group: _Group) -> tuple[Tree, Tree, int]:
    """Parameters, statistics, and the channel count of the last layer; layers come as conv, norm, (SiLU)."""
    params: Tree = {}
    stats: Tree = {}
    last: dict[str, int] = {}
    for layer in range(max(1, len([index for index in _layers(group) if index % 3 == 1]))):
        norm, moments = _norm(group, 3 * layer + 1)
        conv = _conv(group, 3 * layer, CONV_AXES, needed=bool(norm or not moments), **last, **_outputs(norm))
        if conv and not norm:
            group[f"backbone.{3 * layer + 1}.weight"]  # says that it is missing
        params[f"conv_{layer}"] = {**conv, "norm": norm}
        stats[f"conv_{layer}"] = {"norm": moments}
        last = {"inputs": len(conv["bias"])} if conv else {}
    return params, stats, last.get("inputs", 0)


def _decoder(group: _Group) -> tuple[Tree, Tree]:
    """Layers come as linear, (rearrange), norm, (SiLU), then transposed conv, norm, (SiLU), ..., transposed conv."""
    norm, moments = _norm(group, 2)
    params: Tree = {"norm": norm}
    stats: Tree = {"norm": moments}
    last = {"inputs": len(norm["bias"])} if norm else {}
    norms = [index for index in _layers(group) if index >= 5 and index % 3 == 2]
    for layer in range(len(norms)):
        norm, moments = _norm(group, 3 * layer + 5)
        conv = _conv(group, 3 * layer + 4, CONV_TRANSPOSE_AXES, needed=bool(norm), **last, **_outputs(norm))
        if conv and not norm:
            group[f"backbone.{3 * layer + 5}.weight"]  # says that it is missing
        params[f"conv_{layer}"] = {**conv, "norm": norm}
        stats[f"conv_{layer}"] = {"norm": moments}
        last = {"inputs": len(conv["bias"])} if conv else {}
    if params["norm"]:
        linear, channels = _linear(group, "backbone.0"), len(params["norm"]["bias"])
        params["linear"] = {
            "kernel": _channels_last(linear["kernel"], channels, axis=1),
            "bias": _channels_last(linear["bias"], channels, axis=0),
        }
        params |= _conv(group, 3 * len(norms) + 4, CONV_TRANSPOSE_AXES, needed=True, **last)
    return params, stats


def _outputs(norm: Tree) -> dict[str, int]:
    """How many channels a batch norm wants; nothing without its parameters."""
    return {"outputs": len(norm["bias"])} if norm else {}


def _channels_last(array: np.ndarray, channels: int, axis: int) -> np.ndarray:
    """Reorders an axis that runs over (channel, row, column) of a square map to (row, column, channel)."""
    size = math.isqrt(array.shape[axis] // channels)
    if channels * size * size != array.shape[axis]:
        raise ValueError(
            f"from_torch: {array.shape[axis]} features are no square map of {channels} channels (post_head, decoder)"
        )
    lead, tail = array.shape[:axis], array.shape[axis + 1 :]
    split = array.reshape(*lead, channels, size, size, *tail)
    return np.moveaxis(split, axis, axis + 2).reshape(*lead, -1, *tail)
