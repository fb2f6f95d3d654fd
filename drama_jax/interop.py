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
from collections.abc import Mapping
from typing import Any

import numpy as np

from drama_jax.backbones import torch_names as backbone_names
from drama_jax.behaviour import torch_names as behaviour_names

Arrays = Mapping[str, np.ndarray]
Tree = dict[str, Any]

CONV_AXES = (2, 3, 1, 0)  # Conv2d (out, in, row, column) -> (row, column, in, out)
CONV_TRANSPOSE_AXES = (2, 3, 0, 1)  # ConvTranspose2d (in, out, row, column) -> the same


def from_torch(arrays: Arrays) -> Tree:
    """Variables from a released state dict of the world model, of the agent, or of both together.

    Args:
      arrays: parameter name -> array, with the names of the released code (`encoder.backbone.0.weight`, ...).

    Returns:
      A dict with those of the following that the names speak of: `params` and `batch_stats` of
      `world_model.WorldModelState`; `actor`, `critic` and `slow_critic` as in `behaviour`. Arrays keep their dtype.

    Raises:
      ValueError: if a name is not known; the message lists up to three such names.
    """
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, {})[rest] = np.asarray(array)
    known = {"encoder", "dist_head", "image_decoder", "sequence_model", "reward_decoder", "termination_decoder"}
    agent = {"actor", "critic", "slow_critic"}
    unknown = sorted(set(groups) - known - agent - {"symlog_twohot_loss_func"})
    if unknown:
        names = [name for name in arrays if name.partition(".")[0] in unknown][:3]
        raise ValueError(f"from_torch knows no parameter named {', '.join(names)}; expected released Drama names")
    variables: Tree = {}
    if set(groups) & known:
        variables["params"], variables["batch_stats"] = _world_model(groups)
    for name in agent & set(groups):
        variables[name] = behaviour_names.from_torch(groups[name])
    return variables


def _world_model(groups: dict[str, dict[str, np.ndarray]]) -> tuple[Tree, Tree]:
    params: Tree = {}
    batch_stats: Tree = {}
    channels = 0
    if "encoder" in groups:
        params["encoder"], batch_stats["encoder"], channels = _encoder(groups["encoder"])
    if "dist_head" in groups:
        heads = groups["dist_head"]
        post = heads.get("post_head.weight")
        if post is not None:
            params["posterior_head"] = {
                "kernel": _channels_last(post, channels, axis=1).T,
                "bias": heads["post_head.bias"],
            }
        params["prior_head"] = _linear(heads, "prior_head")
    if "image_decoder" in groups:
        params["decoder"], batch_stats["decoder"] = _decoder(groups["image_decoder"])
    if "sequence_model" in groups:
        group = groups["sequence_model"]
        layers = {match[1] for name in group if (match := re.match(r"backbone\.layers\.(\d+)\.", name))}
        params["backbone"] = backbone_names.from_torch(group, num_layers=len(layers), prefix="backbone.")
    for ours, theirs in (("reward_head", "reward_decoder"), ("termination_head", "termination_decoder")):
        if theirs in groups:
            params[ours] = {
                "hidden": _linear(groups[theirs], "backbone.0"),
                "norm": {"scale": groups[theirs]["backbone.1.scale"]},
                "output": _linear(groups[theirs], "head"),
            }
    return params, batch_stats


def _layers(group: Arrays) -> list[int]:
    """Indices of the released `nn.Sequential` that hold parameters, in order."""
    return sorted({int(match[1]) for name in group if (match := re.match(r"backbone\.(\d+)\.", name))})


def _linear(group: Arrays, name: str) -> Tree:
    return {"kernel": group[f"{name}.weight"].T, "bias": group[f"{name}.bias"]}


def _norm(group: Arrays, index: int) -> tuple[Tree, Tree]:
    """(parameters, running statistics) of a batch norm; either is empty if the state dict lacks it."""
    name = f"backbone.{index}"
    params = {"scale": "weight", "bias": "bias"}
    stats = {"mean": "running_mean", "var": "running_var"}
    pick = [
        {ours: group[f"{name}.{theirs}"] for ours, theirs in names.items() if f"{name}.{theirs}" in group}
        for names in (params, stats)
    ]
    return pick[0], pick[1]


def _conv(group: Arrays, index: int, axes: tuple[int, ...]) -> Tree:
    if f"backbone.{index}.weight" not in group:  # a dict of running statistics only
        return {}
    return {"kernel": group[f"backbone.{index}.weight"].transpose(axes), "bias": group[f"backbone.{index}.bias"]}


def _encoder(group: Arrays) -> tuple[Tree, Tree, int]:
    """Parameters, statistics, and the channel count of the last layer; layers come as conv, norm, (SiLU)."""
    params: Tree = {}
    stats: Tree = {}
    norms = [index for index in _layers(group) if index % 3 == 1]
    for layer, index in enumerate(norms):
        norm, moments = _norm(group, index)
        params[f"conv_{layer}"] = {**_conv(group, index - 1, CONV_AXES), "norm": norm}
        stats[f"conv_{layer}"] = {"norm": moments}
    last = group.get(f"backbone.{norms[-1] - 1}.bias")
    return params, stats, 0 if last is None else len(last)


def _decoder(group: Arrays) -> tuple[Tree, Tree]:
    """Layers come as linear, (rearrange), norm, (SiLU), then transposed conv, norm, (SiLU), ..., transposed conv."""
    norm, moments = _norm(group, 2)
    params: Tree = {"norm": norm}
    stats: Tree = {"norm": moments}
    indices = [index for index in _layers(group) if index >= 4]
    for layer, index in enumerate(index for index in indices if index % 3 == 2):
        norm, moments = _norm(group, index)
        params[f"conv_{layer}"] = {**_conv(group, index - 1, CONV_TRANSPOSE_AXES), "norm": norm}
        stats[f"conv_{layer}"] = {"norm": moments}
    if "backbone.0.weight" in group:
        channels = len(group["backbone.2.weight"])
        params["linear"] = {
            "kernel": _channels_last(group["backbone.0.weight"], channels, axis=0).T,
            "bias": _channels_last(group["backbone.0.bias"], channels, axis=0),
        }
        params |= _conv(group, indices[-1], CONV_TRANSPOSE_AXES)
    return params, stats


def _channels_last(array: np.ndarray, channels: int, axis: int) -> np.ndarray:
    """Reorders an axis that runs over (channel, row, column) of a square map to (row, column, channel)."""
    size = math.isqrt(array.shape[axis] // channels)
    lead, tail = array.shape[:axis], array.shape[axis + 1 :]
    split = array.reshape(*lead, channels, size, size, *tail)
    return np.moveaxis(split, axis, axis + 2).reshape(*lead, -1, *tail)
