"""The actor of an imagined step on a GPU: the first product by cuBLAS, all that follows it as one kernel.

The kernel goes on with bias, norm, SiLU, the further hidden layers, logits, Gumbel noise and argmax. A program
serves 16 rows, and all weights stream through every multiprocessor that has one; three quarters of them are the first
layer's, so that one is left to cuBLAS, whose tiles read them fewer times. XLA makes 13 kernels of the whole, none of
which fills the device. The action drawn is that of `jax.random.categorical` with the same key.

Shapes: B rows, F features, U units, A actions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.behaviour.networks import EPSILON
from drama_jax.behaviour.normalisers import InputNormaliser
from drama_jax.behaviour.normalisers import apply as normalise
from drama_jax.nn import gpu_convolution
from drama_jax.nn.gpu_sample import gumbel, is_power_of_two, partitioned_threefry

_ROWS = 16
"""Rows of a program: the fewest that a matrix unit takes."""
_ACTIONS = 32
"""Fewest columns of the logits' product. With 16 of them eight warps share out its depth instead: five times the matrix
instructions, and registers spill."""
_WARPS, _STAGES = 8, 3


def serves(key: jax.Array, parts: Sequence[jax.Array], params: dict[str, Any]) -> bool:
    """Whether `choose_actions` runs here, takes these sizes and draws what JAX would."""
    units = params["output"]["kernel"].shape[0]
    fits = 16 <= units <= 512 and is_power_of_two(units) and all(x.ndim == 2 for x in parts)
    bf16 = all(x.dtype == jnp.bfloat16 for x in parts)
    return gpu_convolution.available() and bf16 and fits and partitioned_threefry(key)


@functools.partial(jax.jit, static_argnames="interpret")
def choose_actions(
    key: jax.Array,
    parts: Sequence[jax.Array],
    normaliser: InputNormaliser,
    params: dict[str, Any],
    *,
    interpret: bool = False,
) -> jax.Array:
    """Samples actions of the policy.

    Args:
      key: consumed.
      parts: [B, F_i] of the compute dtype, side by side the features.
      normaliser: of the features.
      params: of the actor (`networks.actor`), U a power of two.
      interpret: run without a GPU, slowly.

    Returns:
      [B] int32.
    """
    batch, dtype = parts[0].shape[0], parts[0].dtype
    units, actions = params["output"]["kernel"].shape
    layers = sum(name.startswith("hidden_") for name in params)
    inputs = normalise(normaliser, jnp.concatenate(list(parts), axis=-1)).astype(dtype)
    operands = [jax.random.key_data(key), jnp.matmul(inputs, params["hidden_0"]["kernel"].astype(dtype))]
    for i in range(layers):
        dense = params[f"hidden_{i}"]
        operands += [dense["kernel"].astype(dtype)] if i else []
        operands += [dense["bias"], params[f"norm_{i}"]["scale"]]
    missing = (0, max(_ACTIONS, pl.next_power_of_2(actions)) - actions)
    operands.append(jnp.pad(params["output"]["kernel"].astype(dtype), ((0, 0), missing)))
    operands.append(jnp.pad(params["output"]["bias"], missing))
    wide = params["norm_0"]["scale"].dtype
    return pl.pallas_call(
        functools.partial(_program, batch=batch, layers=layers, units=units, actions=actions, wide=wide),
        grid=(pl.cdiv(batch, _ROWS),),
        out_shape=jax.ShapeDtypeStruct((batch,), jnp.int32),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="actor",
    )(*(operand.reshape(-1) for operand in operands))


def _program(*refs: Any, batch: int, layers: int, units: int, actions: int, wide: Any) -> None:
    key_ref, product_ref, *layer_refs, output_ref, output_bias_ref, action_ref = refs
    dtype = product_ref.dtype
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    unit = jnp.arange(units)
    mask = jnp.broadcast_to((row < batch)[:, None], (_ROWS, units))
    x = pltriton.load(product_ref.at[row[:, None] * units + unit[None, :]], mask=mask, other=0.0)
    for i in range(layers):
        *kernel_ref, bias_ref, norm_ref = layer_refs[max(0, 3 * i - 1) : 3 * i + 2]
        if i:
            x = _dot(x, pltriton.load(kernel_ref[0].at[unit[:, None] * units + unit[None, :]]))
        x = _biased(x, pltriton.load(bias_ref.at[unit]), dtype, wide)
        inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / units + EPSILON)
        x = x * (inverse[:, None] * pltriton.load(norm_ref.at[unit])[None, :])
        x = (x / (1.0 + jnp.exp(-x))).astype(dtype)
    action = jnp.arange(output_bias_ref.shape[0])
    x = _dot(x, pltriton.load(output_ref.at[unit[:, None] * action.shape[0] + action[None, :]]))
    scores = _biased(x, pltriton.load(output_bias_ref.at[action]), dtype, wide) + gumbel(
        key_ref, row[:, None] * actions + action[None, :]
    )
    scores = jnp.where((action < actions)[None, :], scores, -jnp.inf)
    pltriton.store(action_ref.at[row], jnp.argmax(scores, axis=1).astype(jnp.int32), mask=row < batch)


def _biased(x: jax.Array, bias: jax.Array, dtype: Any, wide: Any) -> jax.Array:
    """x + bias, rounded as by a dense layer of the compute dtype."""
    rounded = x.astype(dtype).astype(wide) + bias.astype(dtype).astype(wide)[None, :]
    return rounded.astype(dtype).astype(wide)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
