"""Trees of device arrays <-> named numpy arrays, without any code in between.

A leaf is named by its path, for example `agent/world_model/params/encoder/kernel`. Typed PRNG keys become their words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.config import ConfigError


def to_host(tree: Any) -> dict[str, np.ndarray]:
    """Copies every leaf to the host under its name; waits for the device. Buffers may be donated afterwards."""
    words = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(words))
    return {_name(path): np.array(leaf) for path, leaf in leaves}


def from_host(template: Any, saved: Mapping[str, np.ndarray], prefix: str = "") -> Any:
    """The saved arrays in the structure of `template`, on the default device.

    Args:
      template: The tree wanted; its leaves may be `jax.ShapeDtypeStruct`.
      saved: Arrays by name, as from `to_host`.
      prefix: What the names in `saved` begin with, for example "agent/".

    Raises:
      ConfigError: an array is missing, or has another shape or type.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree.unflatten(structure, [_to_device(prefix + _name(path), leaf, saved) for path, leaf in leaves])


def nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    nested: dict[str, Any] = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    return nested


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} as {"a/b": x}."""
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(dict(nested), sep="/")
    return flat


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_device(name: str, template: Any, saved: Mapping[str, np.ndarray]) -> jax.Array:
    if name not in saved:
        raise ConfigError(f"the checkpoint has no array {name}: it belongs to another configuration or version")
    wanted = jax.eval_shape(jax.random.key_data, template) if _is_key(template) else template
    array = saved[name]
    if array.shape != wanted.shape or array.dtype != wanted.dtype:
        raise ConfigError(
            f"the checkpoint's {name} is {array.dtype}{list(array.shape)}, this configuration needs "
            f"{wanted.dtype}{list(wanted.shape)}"
        )
    # A copy: jax cannot donate memory that numpy owns.
    copy = jnp.array(array)
    return jax.random.wrap_key_data(copy) if _is_key(template) else copy
