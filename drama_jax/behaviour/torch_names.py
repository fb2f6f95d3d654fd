"""Names of actor and critic arrays in the released PyTorch code, relative to their network ("actor.", "critic.", ...).

Only a mapping between names and layouts: it serves parameters, gradients and parameter changes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from drama_jax import checks

ACTOR_OFFSET = 1
"""The actor's sequence begins with the input normaliser, which holds no parameters; the critics' begin with a layer."""


def names(layers: int, offset: int) -> dict[tuple[str, str], str]:
    """(module, array) in our parameters -> PyTorch name.

    Args:
      layers: number of hidden layers.
      offset: position of the first linear layer: `ACTOR_OFFSET` for the actor, 0 for the critics.
    """
    mapping = {}
    for i in range(layers):
        linear = offset + 3 * i
        mapping[f"hidden_{i}", "kernel"] = f"{linear}.weight"
        mapping[f"hidden_{i}", "bias"] = f"{linear}.bias"
        mapping[f"norm_{i}", "scale"] = f"{linear + 1}.scale"
    output = offset + 3 * layers
    mapping["output", "kernel"] = f"{output}.weight"
    mapping["output", "bias"] = f"{output}.bias"
    return mapping


def from_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Brings one network's arrays into our layout, dtype unchanged.

    Args:
      arrays: PyTorch name -> array, kernels [out, in]. The number of layers is read off the names.

    Returns:
      Nested dictionary like `BehaviourState.params["actor"]` or `["critic"]`, kernels [in, out].

    Raises:
      ValueError: if the names are not those of an actor or critic, or a shape does not fit; the message lists what is
        missing or not known.
    """
    positions = [int(name.partition(".")[0]) for name in arrays if name.partition(".")[0].isdigit()]
    offset = min(positions, default=0)
    mapping = names(max((max(positions, default=0) - offset) // 3, 0), offset)
    different = sorted(set(mapping.values()) ^ set(arrays))
    if different:
        raise ValueError(f"not the arrays of a released actor or critic: missing or not known: {', '.join(different)}")
    params: dict[str, dict[str, Any]] = {}
    size: int | str = "in"
    for (module, array), name in mapping.items():
        value = np.asarray(arrays[name])
        # In the order of the layers: every one takes what the one before gives.
        checks.arrays("from_torch", **{name: (value, ("out", size) if array == "kernel" else (size,), "any")})
        size = value.shape[0]
        params.setdefault(module, {})[array] = value.T if array == "kernel" else value
    return params
