"""The keys of a rollout's steps as arrays of their own, by one GPU kernel.

A kernel that draws with one key of many is given a copy of it, made by a kernel of its own: 32 of them in
a rollout of 16 steps, of 1.5 to 2 microseconds each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn import gpu_convolution
from drama_jax.nn.gpu_sample import is_power_of_two


def serves(keys: jax.Array) -> bool:
    """Whether `apart` runs here and takes these keys."""
    return gpu_convolution.available() and is_power_of_two(jax.random.key_data(keys).shape[-1])


def apart(keys: jax.Array, *, interpret: bool = False) -> list[jax.Array]:
    """The keys of an array [...] of them, in its order; each may be consumed, the array then not.

    Args:
      keys: of any shape, not consumed here.
      interpret: run without a GPU, slowly.
    """
    data = jax.random.key_data(keys)
    size = data.shape[-1]
    single = pl.pallas_call(
        _program,
        grid=(1,),
        out_shape=[jax.ShapeDtypeStruct((size,), data.dtype)] * keys.size,
        compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="keys_apart",
    )(data.reshape(-1))
    return [jax.random.wrap_key_data(one, impl=jax.random.key_impl(keys)) for one in single]


def _program(keys_ref: Any, *key_refs: Any) -> None:
    for i, ref in enumerate(key_refs):
        word = jnp.arange(ref.shape[0])
        pltriton.store(ref.at[word], pltriton.load(keys_ref.at[i * ref.shape[0] + word]))
