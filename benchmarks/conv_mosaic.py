"""3x3 convolutions by `nn.gpu_convolution_mosaic`, cut in several ways: errors and times beside Triton's and XLA's.

    python -m benchmarks.conv_mosaic             every way to cut the kernel, at the sizes of preset xs, bfloat16
    python -m benchmarks.conv_mosaic --check     only the errors

Needs an H100 or H200, and JAX 0.11. Errors are largest differences over the largest value, from XLA in float32; a row,
a process (`benchmarks.processes`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, floors, processes
from benchmarks.autoencoder import inputs, plain
from drama_jax import nn
from drama_jax.nn import gpu_convolution_mosaic, gpu_convolution_triton
from drama_jax.nn.gpu_convolution_mosaic_program import Cut, Form

CUTS = {
    "rows_4": Cut(),
    "rows_4_deep": Cut(stages=3, behind=2),
    "rows_2": Cut(rows=2),
    "rows_2_deep": Cut(rows=2, stages=3, behind=2),
    "rows_2_deeper": Cut(rows=2, stages=4, behind=2),
    "halves": Cut(rows=2, parts=2),
    "halves_deep": Cut(rows=2, parts=2, stages=3, behind=2),
}
# Frames, h = w, I, O, and whether SiLU ends it, as in the encoder's evaluation, and which phases are read or written.
CASES = {
    "layer_1": (8192, 32, 64, 32, Form(silu=True, to_phases=True)),
    "layer_2": (8192, 16, 128, 48, Form(silu=True, to_phases=True)),
    "conv_64_32": (2048, 32, 64, 32, Form(to_phases=True)),
    "conv_64_16": (2048, 32, 64, 16, Form()),
    "conv_128_48": (2048, 16, 128, 48, Form(to_phases=True)),
    "conv_32_64": (2048, 32, 32, 64, Form(from_phases=True)),
    "conv_16_64": (2048, 32, 16, 64, Form()),
}


def reference(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, silu: bool, from_phases: bool, to_phases: bool
) -> jax.Array:
    """The same by XLA, in the dtype of x and kernel."""
    y = plain(nn.depth_to_space(x) if from_phases else x, kernel).astype(bias.dtype) + bias
    y = (jax.nn.silu(y) if silu else y).astype(x.dtype)
    return nn.space_to_depth(y) if to_phases else y


def by_triton(x: jax.Array, *args: jax.Array, from_phases: bool, **options: bool) -> jax.Array:
    """By `nn.gpu_convolution_triton`, which does not read phases."""
    return gpu_convolution_triton.conv3x3(nn.depth_to_space(x) if from_phases else x, *args, **options)


def row(case: str, name: str, only_check: bool) -> dict[str, Any]:
    """Error and time of one implementation: one of `CUTS`, "triton" or "xla"."""
    frames, height, channels, out, form = CASES[case]
    options: dict[str, Any] = dataclasses.asdict(form)
    x, kernel = inputs(0, frames, height, channels, out)
    x = nn.space_to_depth(x) if form.from_phases else x
    bias = jax.random.normal(jax.random.key(9), (out,), jnp.float32)
    if name == "xla":
        function = functools.partial(reference, **options)
    elif name == "triton":
        function = functools.partial(by_triton, **options)
    else:
        function = functools.partial(gpu_convolution_mosaic.conv3x3, **options, cut=CUTS[name])
    some = slice(-256, None)  # float32 takes twice the memory; the last images are those of the last program
    wide = (array.astype(jnp.float32) for array in (x[some], kernel))
    expected = jax.jit(functools.partial(reference, **options))(*wide, bias)
    run = functools.partial(jax.jit(function), x, kernel, bias)
    difference = jnp.max(jnp.abs(run()[some].astype(jnp.float32) - expected)) / jnp.max(jnp.abs(expected))
    floor = floors.floor_ms(2.0 * x.size * 9 * out, 2.0 * (x.size + x.size // channels * out))
    found = {"error": float(difference), "floor_ms": floor}
    return found if only_check else found | {"ms": common.queued_ms(run)}


def main() -> None:
    """Command line."""
    processes.main("conv_mosaic", __doc__, row, list(CASES), ["xla", "triton", *CUTS])


if __name__ == "__main__":
    main()
