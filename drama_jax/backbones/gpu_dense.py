"""Two ends of an imagined step as GPU kernels: the stem, and out_proj with the residual stream and the next norm.

Products this small leave most of the device idle, so XLA splits their depth and adds the parts in a second kernel, and
norms are a third. Shapes: B rows, S = K C latent, A actions, I inner width, D width. D, K and C are powers of two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_ROWS = 16
"""Rows of a program of `project`: the fewest that a matrix unit takes."""
_WARPS, _STAGES = 8, 3


def depth(size: int) -> int:
    """How much of a depth of `size` is multiplied at a time, a power of two; below 16 the kernels do not serve."""
    return min(64, size & -size)


def embed(
    latent: jax.Array,
    action: jax.Array,
    stem: dict[str, Any],
    block_scale: jax.Array,
    *,
    classes: int,
    eps: tuple[float, float],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The stem for a one-hot latent, as a sum of K rows of its kernel, and the first block's norm. A row a program.

    Args:
      latent: [B, S] of the compute dtype, exactly one-hot in every group of `classes` numbers.
      action: [B] int32.
      stem: its parameters: kernel [S + A, D], bias [D], norm.scale [D].
      block_scale: [D], of the first block's norm.
      classes: C.
      eps: of the stem's and of the block's norm.
      interpret: run without a GPU, slowly.

    Returns:
      The residual stream [B, D] in the parameters' dtype and its norm [B, D] in the compute dtype.
    """
    batch, size = latent.shape
    width = block_scale.shape[0]
    kernel, dtype = stem["kernel"], latent.dtype
    rows = (kernel[:size].astype(dtype).reshape(-1), kernel[size:].reshape(-1))
    residual, normed = pl.pallas_call(
        functools.partial(_stem_program, size=size, width=width, classes=classes, eps=eps),
        grid=(batch,),
        out_shape=[jax.ShapeDtypeStruct((batch * width,), dtype) for dtype in (block_scale.dtype, dtype)],
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="stem",
    )(latent.reshape(-1), action, *rows, stem["bias"], stem["norm"]["scale"], block_scale)
    return residual.reshape(batch, width), normed.reshape(batch, width)


def _stem_program(
    latent_ref: Any, action_ref: Any, kernel_ref: Any, actions_ref: Any, bias_ref: Any, scale_ref: Any,
    block_scale_ref: Any, residual_ref: Any, normed_ref: Any,
    *, size: int, width: int, classes: int, eps: tuple[float, float],
) -> None:  # fmt: skip
    row = pl.program_id(0)
    group, entry, column = jnp.arange(size // classes), jnp.arange(classes), jnp.arange(width)
    place = group[:, None] * classes + entry[None, :]
    latent = pltriton.load(latent_ref.at[row * size + place])
    chosen = jnp.sum(jnp.where(latent > 0.5, place, 0), axis=1)  # [K]
    rows = pltriton.load(kernel_ref.at[chosen[:, None] * width + column[None, :]])
    x = jnp.sum(rows.astype(bias_ref.dtype), axis=0)
    x = x + pltriton.load(actions_ref.at[action_ref[row] * width + column]) + pltriton.load(bias_ref.at[column])
    x = _normed(x, pltriton.load(scale_ref.at[column]), eps[0])
    x = x / (1.0 + jnp.exp(-x))
    pltriton.store(residual_ref.at[row * width + column], x)
    x = _normed(x, pltriton.load(block_scale_ref.at[column]), eps[1])
    pltriton.store(normed_ref.at[row * width + column], x.astype(normed_ref.dtype))


def _normed(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x * (scale * jax.lax.rsqrt(jnp.sum(x * x) / x.shape[0] + epsilon))


def project(
    x: jax.Array, kernel: jax.Array, residual: jax.Array, scale: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """residual + x @ kernel, and its RMS norm.

    Args:
      x: [B, I] of the compute dtype.
      kernel: [I, D] of the compute dtype, I a multiple of 16.
      residual: [B, D] float32.
      scale: [D], of the norm.
      eps: of the norm.
      interpret: run without a GPU, slowly.

    Returns:
      The residual stream [B, D] in its dtype and its norm [B, D] in the compute dtype.
    """
    batch, inner = x.shape
    width = residual.shape[1]
    total, normed = pl.pallas_call(
        functools.partial(_project_program, batch=batch, inner=inner, width=width, depth=depth(inner), eps=eps),
        grid=(pl.cdiv(batch, _ROWS),),
        out_shape=[jax.ShapeDtypeStruct((batch * width,), dtype) for dtype in (residual.dtype, x.dtype)],
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="project",
    )(x.reshape(-1), kernel.reshape(-1), residual.reshape(-1), scale)
    return total.reshape(batch, width), normed.reshape(batch, width)


def _project_program(
    x_ref: Any, kernel_ref: Any, residual_ref: Any, scale_ref: Any, total_ref: Any, normed_ref: Any,
    *, batch: int, inner: int, width: int, depth: int, eps: float,
) -> None:  # fmt: skip
    row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
    there = (row < batch)[:, None]
    column, entry = jnp.arange(width), jnp.arange(depth)
    wide = residual_ref.dtype

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        at = k * depth + entry
        index = row[:, None] * inner + at[None, :]
        x = pltriton.load(x_ref.at[index], mask=jnp.broadcast_to(there, (_ROWS, depth)), other=0.0)
        weights = pltriton.load(kernel_ref.at[at[:, None] * width + column[None, :]])
        return total + jnp.dot(x, weights, preferred_element_type=wide)

    update = jax.lax.fori_loop(0, inner // depth, step, jnp.zeros((_ROWS, width), wide))
    index = row[:, None] * width + column[None, :]
    mask = jnp.broadcast_to(there, (_ROWS, width))
    # The product leaves a dense layer in the compute dtype.
    total = pltriton.load(residual_ref.at[index], mask=mask, other=0.0) + update.astype(x_ref.dtype).astype(wide)
    pltriton.store(total_ref.at[index], total, mask=mask)
    inverse = jax.lax.rsqrt(jnp.sum(total * total, axis=1) / width + eps)
    normed = total * (inverse[:, None] * pltriton.load(scale_ref.at[column])[None, :])
    pltriton.store(normed_ref.at[index], normed.astype(normed_ref.dtype), mask=mask)
