"""Two ends of an imagined step as GPU kernels: the stem, and the residual stream after out_proj with the next norm.

The products are left to cuBLAS. A kernel of product and norm would need whole rows in one program, and so reads all
weights in every program: on an H200 it took 16.7 microseconds, where the products of cuBLAS in a step take 4.7 and 6.4.
Shapes: B rows, S = K C latent, A actions, D width. D, K and C are powers of two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_WARPS = 8


@functools.partial(jax.jit, static_argnames=("classes", "eps", "interpret"))
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


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add(
    residual: jax.Array, update: jax.Array, scale: jax.Array, *, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """residual + update, and its RMS norm. A row a program.

    Args:
      residual: [B, D] of the parameters' dtype.
      update: [B, D] of the compute dtype, the result of out_proj.
      scale: [D], of the norm.
      eps: of the norm.
      interpret: run without a GPU, slowly.

    Returns:
      The residual stream [B, D] in its dtype and its norm [B, D] in the compute dtype.
    """
    batch, width = residual.shape
    total, normed = pl.pallas_call(
        functools.partial(_add_program, width=width, eps=eps),
        grid=(batch,),
        out_shape=[jax.ShapeDtypeStruct((batch * width,), dtype) for dtype in (residual.dtype, update.dtype)],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="add_and_norm",
    )(residual.reshape(-1), update.reshape(-1), scale)
    return total.reshape(batch, width), normed.reshape(batch, width)


def _add_program(
    residual_ref: Any, update_ref: Any, scale_ref: Any, total_ref: Any, normed_ref: Any, *, width: int, eps: float
) -> None:
    column = jnp.arange(width)
    at = pl.program_id(0) * width + column
    total = pltriton.load(residual_ref.at[at])
    total = total + pltriton.load(update_ref.at[at]).astype(total.dtype)
    pltriton.store(total_ref.at[at], total)
    normed = _normed(total, pltriton.load(scale_ref.at[column]), eps)
    pltriton.store(normed_ref.at[at], normed.astype(normed_ref.dtype))
