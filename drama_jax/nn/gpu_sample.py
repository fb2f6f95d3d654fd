"""Sampling of a stochastic latent as one GPU kernel: softmax, uniform share, Gumbel noise, argmax, one-hot.

XLA needs three kernels and stores the noise. Here it is computed where it is used, number for number what
`jax.random.categorical` draws from the same key (Threefry-2x32, Salmon et al. 2011, with counters partitioned as JAX
does by default), so that a run does not depend on which of the two serves it.

Shapes: B rows, K categoricals, C classes, S = K C; K and C powers of two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn import gpu_convolution

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_WARPS = 8


def serves(key: jax.Array, raw: jax.Array, classes: int) -> bool:
    """Whether `sample_latent` runs here and draws what JAX would."""
    groups = raw.shape[-1] // classes
    sizes = is_power_of_two(groups) and is_power_of_two(classes) and raw.size < 2**32
    return gpu_convolution.available() and sizes and raw.dtype == jnp.bfloat16 and partitioned_threefry(key)


def is_power_of_two(number: int) -> bool:
    """Triton's arrays have no other lengths."""
    return number > 0 and number & (number - 1) == 0


def partitioned_threefry(key: jax.Array) -> bool:
    """Whether JAX draws from `key` what `gumbel` computes."""
    return str(jax.random.key_impl(key)) == "threefry2x32" and getattr(jax.config, "jax_threefry_partitionable", True)


@functools.partial(jax.jit, static_argnames=("classes", "unimix", "interpret"))
def sample_latent(
    key: jax.Array, raw: jax.Array, bias: jax.Array, *, classes: int, unimix: float, interpret: bool = False
) -> jax.Array:
    """One-hot samples of categoricals with a uniform share, see `distributions.unimix` and `sample_one_hot`.

    Args:
      key: consumed.
      raw: [..., S], the product of a latent head, without its bias.
      bias: [S] of the same dtype.
      classes: C.
      unimix: the uniform share; `distributions.unimix` divides it by K, and so does this.
      interpret: run without a GPU, slowly.

    Returns:
      [..., S] in the dtype of `raw`.
    """
    size = raw.shape[-1]
    sample = pl.pallas_call(
        functools.partial(_program, groups=size // classes, classes=classes, unimix=unimix),
        grid=(raw.size // size,),
        out_shape=jax.ShapeDtypeStruct((raw.size,), raw.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="sample_latent",
    )(jax.random.key_data(key), raw.reshape(-1), bias)
    return sample.reshape(raw.shape)


def _program(
    key_ref: Any, raw_ref: Any, bias_ref: Any, out_ref: Any, *, groups: int, classes: int, unimix: float
) -> None:
    row = pl.program_id(0)
    entry = jnp.arange(classes)
    place = jnp.arange(groups)[:, None] * classes + entry[None, :]  # [K, C]
    raw = pltriton.load(raw_ref.at[row * (groups * classes) + place])
    logits = (raw + pltriton.load(bias_ref.at[place])).astype(jnp.float32)
    powers = jnp.exp(logits - jnp.max(logits, axis=1)[:, None])
    probs = powers / jnp.sum(powers, axis=1)[:, None]
    log_probs = jnp.log(unimix / groups + (1 - unimix) * probs)
    choice = jnp.argmax(log_probs + gumbel(key_ref, row * (groups * classes) + place), axis=1)
    one_hot = jnp.where(entry[None, :] == choice[:, None], 1.0, 0.0)
    pltriton.store(out_ref.at[row * (groups * classes) + place], one_hot.astype(out_ref.dtype))


def gumbel(key_ref: Any, place: jax.Array) -> jax.Array:
    """Inside a kernel: entries `place` of the flattened `jax.random.gumbel(key)`, float32.

    Args:
      key_ref: [2] uint32, the key's data.
      place: whole numbers below 2^32.
    """
    bits = _random_bits(key_ref[0], key_ref[1], place.astype(jnp.uint32))
    # As `jax.random.uniform`: 23 bits of mantissa, from the smallest positive number to 1.
    tiny = float(jnp.finfo(jnp.float32).tiny)
    ones = jax.lax.bitcast_convert_type(jnp.uint32(0x3F800000) | (bits >> jnp.uint32(9)), jnp.float32)
    uniform = jnp.maximum((ones - 1.0) * (1.0 - tiny) + tiny, tiny)
    return -jnp.log(-jnp.log(uniform))


def _random_bits(key_0: jax.Array, key_1: jax.Array, count: jax.Array) -> jax.Array:
    """32 random bits for each count."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.full_like(count, 0) + keys[0], count + keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))
            y = x ^ y
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y
