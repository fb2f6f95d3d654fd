"""Names of actor and critic arrays in the released PyTorch code's agent.

Only a mapping between names and layouts: it serves parameters, gradients and parameter changes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Network = Literal["actor", "critic", "slow_critic"]


def names(network: Network, layers: int) -> dict[tuple[str, str], str]:
    """(module, array) in our parameters -> name in the PyTorch state dictionary.

    Args:
      network: the actor's sequence begins with the input normaliser, which holds no parameters; the critics' do not.
      layers: number of hidden layers.
    """
    first = 1 if network == "actor" else 0
    mapping = {}
    for i in range(layers):
        linear = first + 3 * i
        mapping[f"hidden_{i}", "kernel"] = f"{network}.{linear}.weight"
        mapping[f"hidden_{i}", "bias"] = f"{network}.{linear}.bias"
        mapping[f"norm_{i}", "scale"] = f"{network}.{linear + 1}.scale"
    output = first + 3 * layers
    mapping["output", "kernel"] = f"{network}.{output}.weight"
    mapping["output", "bias"] = f"{network}.{output}.bias"
    return mapping


def from_torch(network: Network, layers: int, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Picks one network's arrays and brings them into our layout, dtype unchanged.

    Args:
      network: which one.
      layers: number of hidden layers.
      arrays: PyTorch name -> array, kernels [out, in]; other names are ignored.

    Returns:
      Nested dictionary like `BehaviourState.params[network]`, kernels [in, out].

    Raises:
      KeyError: if an array is missing.
    """
    params: dict[str, dict[str, Any]] = {}
    for (module, array), name in names(network, layers).items():
        value = np.asarray(arrays[name])
        params.setdefault(module, {})[array] = value.T if array == "kernel" else value
    return params
