"""Several agents in one program: their states stacked along a first axis, one compiled function for all.

N agents differ in seed and in the numbers of `agent.Hyper`; everything static is common to them. One agent is kept as
it is, without that axis. With more than one device the axis is cut into equal parts, one per device, and each device
runs the same program on its part: agents do not talk to each other, so nothing crosses between devices.

Shapes: N agents, E = 1 environment each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from drama_jax.config import ConfigError

Tree = TypeVar("Tree")
_AXIS = "agents"


class Together:
    """How the arrays of N agents lie on the devices.

    Args:
      count: N.
      devices: Devices to use; N is a multiple of their number.

    Raises:
      ConfigError: if it is not.
    """

    def __init__(self, count: int, devices: Sequence[jax.Device] | None = None) -> None:
        self.count = count
        self.devices = list(devices or jax.local_devices()[:1])
        if count % len(self.devices):
            raise ConfigError(f"{count} agents cannot be shared out evenly to {len(self.devices)} devices")
        self._each = count // len(self.devices)
        self._identity = count, tuple(self.devices)
        self.mesh = Mesh(np.array(self.devices), (_AXIS,))
        self.sharding = NamedSharding(self.mesh, PartitionSpec(_AXIS))

    def device(self, index: int) -> jax.Device:
        """Where agent `index` lives."""
        return self.devices[index // self._each]

    def stack(self, trees: Sequence[Tree]) -> Tree:
        """N trees of arrays, each on its agent's device, as one tree of arrays [N, ...]; one tree as it is."""
        if self.count == 1:
            return trees[0]
        return jax.tree.map(lambda *leaves: self._stack(leaves), *trees)

    def _stack(self, leaves: Sequence[jax.Array]) -> jax.Array:
        parts = [
            jax.device_put(jax.numpy.stack(leaves[first : first + self._each]), self.device(first))
            for first in range(0, self.count, self._each)
        ]
        shape = (self.count, *leaves[0].shape)
        return jax.make_array_from_single_device_arrays(shape, self.sharding, parts)

    def put(self, array: np.ndarray) -> jax.Array:
        """An array [N, ...] of the host, on the devices; a copy, as the host may go on to use its memory."""
        return jax.device_put(array, None if self.count == 1 else self.sharding, may_alias=False)

    def agent(self, tree: Tree, index: int) -> Tree:
        """Agent `index` of a stacked tree, copied."""
        return tree if self.count == 1 else jax.tree.map(lambda leaf: leaf[index], tree)

    def of_host(self, named: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
        """Agent `index` of arrays [N, ...] on the host, by name."""
        return named if self.count == 1 else {name: array[index] for name, array in named.items()}

    def program(
        self, function: Callable[..., Any], *, shared: tuple[int, ...] = (), donated: int | None = None
    ) -> Callable[..., Any]:
        """One compiled function for all N > 1 agents of a function of one agent; compiled once per process.

        Args:
          function: Of arrays without the agents' axis.
          shared: Positions of the arguments that all agents have in common.
          donated: Position of the argument that is given up: 0, 1, or None for none.
        """
        return functools.partial(_RUNS[donated], function, self, shared)

    def lowered(self, function: Callable[..., Any], *arguments: Any, donated: int | None = None) -> jax.stages.Lowered:
        """`program(function, donated=donated)` for arguments of these shapes, to be compiled."""
        return _RUNS[donated].lower(function, self, (), *arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Together) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def _all(function: Callable[..., Any], together: Together, shared: tuple[int, ...], *arguments: Any) -> Any:
    axes = [None if position in shared else 0 for position in range(len(arguments))]
    specs = tuple(PartitionSpec() if axis is None else PartitionSpec(_AXIS) for axis in axes)
    part = jax.shard_map(
        jax.vmap(function, in_axes=axes),
        mesh=together.mesh,
        in_specs=specs,
        out_specs=PartitionSpec(_AXIS),
        check_vma=False,
    )
    return part(*arguments)


_RUNS = {
    donated: jax.jit(_all, static_argnums=(0, 1, 2), donate_argnums=() if donated is None else 3 + donated)
    for donated in (None, 0, 1)
}
