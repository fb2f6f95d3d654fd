"""Milliseconds of the autoencoder of preset xs: encoder layers in evaluation mode, and training passes.

    python -m benchmarks.autoencoder

Layers are timed as XLA runs them and as our GPU kernels do, on the 8192 context frames of one imagination and on the
2048 frames of a training batch, and so is the backward pass of the first layer; results are compared. `floor_ms` is the
larger of bytes over bandwidth and operations over peak rate.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, floors
from drama_jax import nn, vae
from drama_jax.config import preset
from drama_jax.nn import gpu_convolution, gpu_convolution_gradient
from drama_jax.nn.batch_norm import conv_normalise_silu, normalise_silu

# (height, input channels in phases, output channels, output to phases) of the encoder's layers, preset xs.
LAYERS = [(32, 16, 64, False), (32, 64, 32, True), (16, 128, 48, True), (8, 192, 64, True), (4, 256, 64, False)]
# (height, input channels, output channels) of training's convolutions, forward and backward.
TRAINING = [(32, 16, 64), (32, 64, 32), (32, 64, 16), (32, 32, 64), (16, 128, 48), (8, 192, 64)]


def layer_rows(frames: int) -> Iterator[dict[str, Any]]:
    """Every encoder layer in evaluation mode: convolution, bias, SiLU and the next layer's layout."""
    for i, (height, channels, out, to_phases) in enumerate(LAYERS):
        x, kernel = inputs(i, frames, height, channels, out)
        bias = jax.random.normal(jax.random.key(9), (out,), jnp.float32)

        def xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, phases: bool = to_phases) -> jax.Array:
            y = jax.nn.silu(plain(x, kernel).astype(bias.dtype) + bias).astype(x.dtype)
            return nn.space_to_depth(y) if phases else y

        ours = functools.partial(gpu_convolution.conv3x3, silu=True, to_phases=to_phases)
        functions = {"xla": xla, "pallas": ours}
        yield from compared(f"layer_{i}", functions, (x, kernel, bias), channels * out, channels + out)


def training_rows(frames: int) -> Iterator[dict[str, Any]]:
    """Convolutions of training, and their kernel gradients: cuDNN through XLA against ours."""
    for i, (height, channels, out) in enumerate(TRAINING):
        x, kernel = inputs(i, frames, height, channels, out)
        functions: dict[str, Any] = {"xla": plain, "pallas": gpu_convolution.conv3x3}
        yield from compared(f"conv_{channels}_{out}", functions, (x, kernel), channels * out, channels + out)
        if out > 64:
            continue

        def by_kernel(x: jax.Array, gradient: jax.Array, shape: tuple[int, ...] = kernel.shape) -> jax.Array:
            return jax.vjp(functools.partial(plain, x), jnp.zeros(shape, x.dtype))[1](gradient)[0]

        if channels <= 64:
            gradient = plain(x, kernel)
            functions = {"xla": by_kernel, "pallas": gpu_convolution_gradient.kernel_gradient}
            name = f"kernel_gradient_{channels}_{out}"
            yield from compared(name, functions, (x, gradient), channels * out, channels + out)


def first_layer_rows(frames: int) -> Iterator[dict[str, Any]]:
    """Backward pass of training's first layer: the passes of XLA and our kernel gradient against one kernel."""
    height, channels, out, _ = LAYERS[0]
    x, kernel = inputs(0, frames, height, channels, out)
    gradient = jax.random.normal(jax.random.key(8), (frames, height, height, out), x.dtype)
    affine = jnp.ones((out // 4,), jnp.float32), jnp.zeros((out // 4,), jnp.float32)
    forward = {
        "xla": lambda kernel: normalise_silu(nn.conv3x3(x, kernel), *affine, 4, 1e-5),
        "pallas": lambda kernel: conv_normalise_silu(x, kernel, *affine, 4, 1e-5),
    }
    none = jax.tree.map(jnp.zeros_like, affine)  # the gradients of mean and variance
    # What the forward passes keep is an argument of the backward passes, which alone are timed.
    pulls = {name: jax.vjp(function, kernel)[1] for name, function in forward.items()}

    def backward(name: str, x: jax.Array, gradient: jax.Array, pulls: Any) -> jax.Array:
        return pulls[name]((gradient, *none))[0]

    functions = {name: functools.partial(backward, name) for name in pulls}
    arguments = (x, gradient, pulls)
    yield from compared("first_layer_backward", functions, arguments, channels * out, channels + 2 * out)


def inputs(seed: int, frames: int, height: int, channels: int, out: int) -> tuple[jax.Array, jax.Array]:
    """Random activations [frames, height, height, channels] and a kernel [3, 3, channels, out], bfloat16."""
    x_key, kernel_key = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(x_key, (frames, height, height, channels), jnp.bfloat16)
    return x, jax.random.normal(kernel_key, (3, 3, channels, out), jnp.bfloat16) * (9 * channels) ** -0.5


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as XLA runs it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def compared(
    name: str, functions: dict[str, Any], arguments: tuple[Any, ...], products: int, channels: int
) -> Iterator[dict[str, Any]]:
    """One row per implementation; `error` is the largest difference from the first, over its largest value."""
    cells = arguments[0].size // arguments[0].shape[-1]
    floor = floors.floor_ms(2.0 * cells * 9 * products, 2.0 * cells * channels)
    expected = None
    for implementation, function in functions.items():
        run = functools.partial(jax.jit(function), *arguments)
        result = run().astype(jnp.float32)
        expected = result if expected is None else expected
        error = float(jnp.abs(result - expected).max() / jnp.abs(expected).max())
        row = {"name": name, "implementation": implementation, "ms": common.queued_ms(run), "floor_ms": floor}
        yield row | {"error": error}


def pass_rows(frames: int, context: int) -> Iterator[dict[str, Any]]:
    """Encoder and decoder as a whole: training forward and backward, evaluation."""
    config, dtype = preset("xs").agent.world_model.autoencoder, jnp.bfloat16
    params, stats = jax.jit(lambda key: vae.init(key, config, dtype))(jax.random.key(0))
    pixels = jax.random.bits(jax.random.key(1), (context, *config.image_shape), jnp.uint8)
    latent = jax.random.normal(jax.random.key(2), (frames, config.latent_size), dtype)

    def encode(params: Any, pixels: jax.Array, train: bool) -> jax.Array:
        phases = vae.frames_to_phases(pixels, dtype)
        return vae.encode(config, params, stats, phases, train=train, dtype=dtype)[0]

    def decode(params: Any, latent: jax.Array) -> jax.Array:
        return vae.decode(config, params, stats, latent, train=True, dtype=dtype)[0]

    functions = {
        "encoder_evaluation": (lambda p: encode(p, pixels, False), context),
        "encoder_forward": (lambda p: encode(p, pixels[:frames], True), frames),
        "encoder_forward_backward": (jax.grad(lambda p: encode(p, pixels[:frames], True).astype(float).sum()), frames),
        "decoder_forward": (lambda p: decode(p, latent), frames),
        "decoder_forward_backward": (jax.grad(lambda p: decode(p, latent).sum()), frames),
    }
    for name, (function, count) in functions.items():
        yield {"name": name, "frames": count, "ms": common.queued_ms(functools.partial(jax.jit(function), params))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2048, help="frames of a training batch")
    parser.add_argument("--context", type=int, default=8192, help="context frames of an imagination")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    rows = [pass_rows(arguments.frames, arguments.context)]
    if gpu_convolution.available():
        frames = arguments.frames
        rows = [layer_rows(arguments.context), training_rows(frames), first_layer_rows(frames), *rows]
    common.write_rows("autoencoder", itertools.chain(*rows), arguments.out)


if __name__ == "__main__":
    main()
