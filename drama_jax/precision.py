"""Which dtype to compute in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """`dtype`, or float32 if it is narrower: that of parameters, statistics, logarithms and losses.

    `jnp.promote_types(dtype, jnp.float32)` is the same but refuses under strict dtype promotion.
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32."""
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))
