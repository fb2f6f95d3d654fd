"""Every Pallas name of `ssd`: how a kernel is launched, and its loads, stores and matrix products.

The kernels are in `gpu_forward` and `gpu_backward`, what they share in `places` and `decays`; none of those imports
Pallas, and nothing here knows the scan. Whoever moves to another lowering starts in this file.

Lowered through Triton: it runs from Ampere on, and its kernels take any T, P to 128 and N to 256. A forward kernel by
Mosaic, for Hopper alone, is `benchmarks/ssd_mosaic.py`. On an H100 the two take the same time at the shape that Drama
trains with, and Mosaic's takes 0.6 to 0.8 of Triton's where T is 1,024 and more; the backward pass, four fifths of the
time of both, is by Triton alone (benchmarks/README.md, SSD scan). JAX deprecates Triton's lowering since 0.11;
`compiler_params` selects it on 0.10 and 0.11.

Arrays are seen flat, and read and written by offset. A mask of None is a full one, which costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.precision import at_least_float32


def call(
    program: Callable[[Any, Any], None],
    operands: Any,
    out_shapes: dict[str, jax.ShapeDtypeStruct],
    *,
    name: str,
    programs: int,
    warps: int,
    stages: int,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs `program(read, write)` as often as `programs` says, all at the same time.

    Args:
      program: gets references to flat arrays, `read` in the structure of `operands`, `write` in that of `out_shapes`.
      operands: any structure of arrays.
      out_shapes: of the outputs, by name.
      name: of the kernel.
      programs: how many.
      warps: of 32 threads each that one program has.
      stages: rounds of a loop whose loads the compiler may have under way at once.
      interpret: run without a GPU.

    Returns:
      The outputs by name.
    """
    leaves, tree = jax.tree.flatten(operands)
    names = list(out_shapes)

    def kernel(*refs: Any) -> None:
        program(jax.tree.unflatten(tree, refs[: len(leaves)]), dict(zip(names, refs[len(leaves) :])))

    flat = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct((math.prod(out.shape),), out.dtype) for out in out_shapes.values()],
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*[leaf.reshape(-1) for leaf in leaves])
    return {name: value.reshape(out_shapes[name].shape) for name, value in zip(names, flat)}


def program_id() -> jax.Array:
    """Which of the programs this is, from 0."""
    return pl.program_id(0)


def load(ref: Any, offset: jax.Array, mask: jax.Array | None) -> jax.Array:
    """What is at the offsets, 0 where the mask does not hold."""
    if mask is None:
        return pltriton.load(ref.at[offset])
    return pltriton.load(ref.at[offset], mask=jnp.broadcast_to(mask, offset.shape), other=0)


def store(ref: Any, offset: jax.Array, mask: jax.Array | None, value: jax.Array, only: jax.Array | None = None) -> None:
    """Writes in the array's dtype where the mask holds, if `only` does."""
    if only is not None:
        mask = only if mask is None else mask & only
    mask = None if mask is None else jnp.broadcast_to(mask, offset.shape)
    pltriton.store(ref.at[offset], value.astype(ref.dtype), mask=mask)


def dot(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """The matrix product, added up in at least float32; of float32 operands to about 21 bits."""
    precision: Any = None
    if a.dtype == jnp.float32:
        # Left alone, Triton would take one TF32 product, of three digits. The interpreter does not know the triple.
        precision = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=at_least_float32(a.dtype))


def quotient_and_rest(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Of non-negative numbers; `//` and `%` would handle signs, which does not lower."""
    quotient = jax.lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor
