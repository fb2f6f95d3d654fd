"""Which dtype to compute in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from drama_jax.config import ConfigError


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """`dtype`, or float32 if it is narrower: that of parameters, statistics, logarithms and losses.

    `jnp.promote_types(dtype, jnp.float32)` is the same but refuses under strict dtype promotion.
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def named(name: str) -> np.dtype:
    """The dtype of a configuration's `compute_dtype`.

    Raises:
      ConfigError: it is still "auto", or float64 while JAX has no 64-bit types.
    """
    if name == "auto":
        raise ConfigError(
            "compute_dtype is 'auto' here; decide it with agent.resolve, or name a dtype such as 'float32'"
        )
    if name == "float64" and jnp.result_type(float) != jnp.float64:
        raise ConfigError("compute_dtype 'float64' needs JAX's 64-bit types: set JAX_ENABLE_X64=1, or give 'float32'")
    return jnp.dtype(name)


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32."""
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))
