"""The actor of an imagined step as one GPU kernel: normalisation, hidden layers, logits, Gumbel noise, argmax.

A program serves 16 rows; the weights stream through every multiprocessor that has one. XLA makes 13 kernels of it, none
of which fills the device. The action drawn is that of `jax.random.categorical` with the same key.

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
from drama_jax.behaviour.normalisers import CLIP, InputNormaliser, scale
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
    fits = 16 <= units <= 512 and is_power_of_two(units) and all(x.ndim == 2 and x.shape[1] % 16 == 0 for x in parts)
    bf16 = all(x.dtype == jnp.bfloat16 for x in parts)
    return gpu_convolution.available() and bf16 and fits and partitioned_threefry(key)


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
      parts: [B, F_i] of the compute dtype, side by side the features; F_i a multiple of 16.
      normaliser: of the features.
      params: of the actor (`networks.actor`), U a power of two.
      interpret: run without a GPU, slowly.

    Returns:
      [B] int32.
    """
    batch, dtype = parts[0].shape[0], parts[0].dtype
    units, actions = params["output"]["kernel"].shape
    layers = sum(name.startswith("hidden_") for name in params)
    padded = max(_ACTIONS, pl.next_power_of_2(actions))
    operands = [jax.random.key_data(key), normaliser.mean, scale(normaliser), *parts]
    for i in range(layers):
        dense = params[f"hidden_{i}"]
        operands += [dense["kernel"].astype(dtype), dense["bias"].astype(dtype), params[f"norm_{i}"]["scale"]]
    missing = (0, padded - actions)
    operands.append(jnp.pad(params["output"]["kernel"].astype(dtype), ((0, 0), missing)))
    operands.append(jnp.pad(params["output"]["bias"].astype(dtype), missing))
    sizes = tuple(part.shape[1] for part in parts)
    return pl.pallas_call(
        functools.partial(_program, batch=batch, sizes=sizes, layers=layers, units=units, actions=actions),
        grid=(pl.cdiv(batch, _ROWS),),
        out_shape=jax.ShapeDtypeStruct((batch,), jnp.int32),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="actor",
    )(*(operand.reshape(-1) for operand in operands))


def _program(*refs: Any, batch: int, sizes: tuple[int, ...], layers: int, units: int, actions: int) -> None:
    key_ref, mean_ref, scale_ref, *part_refs = refs[: 3 + len(sizes)]
    first = 3 + len(sizes)
    layer_refs = [refs[first + 3 * i : first + 3 * i + 3] for i in range(layers)]
    output_ref, output_bias_ref, action_ref = refs[first + 3 * layers :]
    dtype, wide = output_ref.dtype, mean_ref.dtype
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    there, unit = (row < batch)[:, None], jnp.arange(units)

    def product(part_ref: Any, size: int, start: int, total: jax.Array) -> jax.Array:
        depth = min(128, size & -size)

        def step(k: jax.Array, total: jax.Array) -> jax.Array:
            at = k * depth + jnp.arange(depth)
            mask = jnp.broadcast_to(there, (_ROWS, depth))
            x = pltriton.load(part_ref.at[row[:, None] * size + at[None, :]], mask=mask, other=0.0).astype(wide)
            x = (x - pltriton.load(mean_ref.at[start + at])[None, :]) * pltriton.load(scale_ref.at[start + at])[None, :]
            weights = pltriton.load(layer_refs[0][0].at[(start + at)[:, None] * units + unit[None, :]])
            return total + _dot(jnp.clip(x, -CLIP, CLIP).astype(dtype), weights)

        return jax.lax.fori_loop(0, size // depth, step, total)

    x = jnp.zeros((_ROWS, units), jnp.float32)
    for i, (ref, size) in enumerate(zip(part_refs, sizes)):
        x = product(ref, size, sum(sizes[:i]), x)
    for i, (kernel_ref, bias_ref, norm_ref) in enumerate(layer_refs):
        if i:
            x = _dot(x, pltriton.load(kernel_ref.at[unit[:, None] * units + unit[None, :]]))
        x = _biased(x, bias_ref, unit, dtype, wide)
        inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / units + EPSILON)
        x = x * (inverse[:, None] * pltriton.load(norm_ref.at[unit])[None, :])
        x = (x / (1.0 + jnp.exp(-x))).astype(dtype)
    action = jnp.arange(output_bias_ref.shape[0])
    x = _dot(x, pltriton.load(output_ref.at[unit[:, None] * action.shape[0] + action[None, :]]))
    scores = _biased(x, output_bias_ref, action, dtype, wide) + gumbel(
        key_ref, row[:, None] * actions + action[None, :]
    )
    scores = jnp.where((action < actions)[None, :], scores, -jnp.inf)
    pltriton.store(action_ref.at[row], jnp.argmax(scores, axis=1).astype(jnp.int32), mask=row < batch)


def _biased(x: jax.Array, bias_ref: Any, at: jax.Array, dtype: Any, wide: Any) -> jax.Array:
    """x + bias, rounded as by a dense layer of the compute dtype."""
    return (
        (x.astype(dtype).astype(wide) + pltriton.load(bias_ref.at[at]).astype(wide)[None, :]).astype(dtype).astype(wide)
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
