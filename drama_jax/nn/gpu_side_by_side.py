"""The steps of a rollout laid side by side in memory, as one GPU kernel.

XLA joins many arrays by asking of every number which of them it comes from: 0.17 ms (H200) for the features of 17 steps
and their hidden states, 140 MB to read and write. Here every program copies its row of each.

Shapes: B rows, L + 1 steps, S latent size, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.nn import gpu_convolution
from drama_jax.nn.gpu_sample import is_power_of_two

_WARPS = 4


def serves(steps: Sequence[tuple[jax.Array, jax.Array]]) -> bool:
    """Whether `side_by_side` runs here and takes these arrays."""
    sizes = all(is_power_of_two(x.shape[-1]) and x.ndim == 2 for x in steps[0])
    return gpu_convolution.available() and sizes and all(x.dtype == jnp.bfloat16 for step in steps for x in step)


def side_by_side(
    steps: Sequence[tuple[jax.Array, jax.Array]], first: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of L + 1 steps, each z [B, S] and d [B, D] of one dtype.

    Args:
      steps: in their order; S and D powers of two.
      first: 0 or 1, the step whose d is the first of the second result.
      interpret: run without a GPU, slowly.

    Returns:
      z and d of every step [B, L + 1, S + D], and d of L steps from `first` on [B, L, D].
    """
    (batch, latent), width = steps[0][0].shape, steps[0][1].shape[1]
    count, dtype = len(steps), steps[0][0].dtype
    features, hiddens = pl.pallas_call(
        functools.partial(_program, latent=latent, width=width, first=first),
        grid=(batch,),
        out_shape=[
            jax.ShapeDtypeStruct((batch * count * (latent + width),), dtype),
            jax.ShapeDtypeStruct((batch * (count - 1) * width,), dtype),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="side_by_side",
    )(*(x.reshape(-1) for step in steps for x in step))
    return features.reshape(batch, count, latent + width), hiddens.reshape(batch, count - 1, width)


def _program(*refs: Any, latent: int, width: int, first: int) -> None:
    """One row of all steps; `refs` are those of z and d by turns, and of the two results."""
    *step_refs, features_ref, hiddens_ref = refs
    row, count = pl.program_id(0), len(step_refs) // 2
    entry, column = jnp.arange(latent), jnp.arange(width)
    for step in range(count):
        z = pltriton.load(step_refs[2 * step].at[row * latent + entry])
        d = pltriton.load(step_refs[2 * step + 1].at[row * width + column])
        start = (row * count + step) * (latent + width)
        pltriton.store(features_ref.at[start + entry], z)
        pltriton.store(features_ref.at[start + latent + column], d)
        if first <= step < first + count - 1:
            pltriton.store(hiddens_ref.at[(row * (count - 1) + step - first) * width + column], d)
