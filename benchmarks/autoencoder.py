"""Milliseconds of the autoencoder of preset xs: encoder layers in evaluation mode, and training passes.

    python -m benchmarks.autoencoder

The layers are timed as XLA runs them and as the fused kernel does at several tilings, on the 8192 context frames of
one imagination; outputs are compared. `floor_ms` is the larger of bytes over bandwidth and operations over peak rate.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from drama_jax import nn, vae
from drama_jax.config import preset
from drama_jax.nn import fused_convolution

# (height, input channels in phases, output channels, output to phases) of the encoder's layers, preset xs.
LAYERS = [(32, 16, 64, False), (32, 64, 32, True), (16, 128, 48, True), (8, 192, 64, True), (4, 256, 64, False)]


def floor_ms(flop: float, traffic: float) -> float | None:
    """The least time for so many operations and bytes on this card; None if its ceilings are not known."""
    ceilings = common.CEILINGS.get(common.device_name())
    if ceilings is None:
        return None
    return 1e3 * max(flop / ceilings["bf16_flop_per_s"], traffic / ceilings["bytes_per_s"])


def layer_rows(frames: int, tilings: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """XLA and every tiling of every encoder layer."""
    rows = []
    for i, (height, channels, out, to_phases) in enumerate(LAYERS):
        keys = jax.random.split(jax.random.key(i), 3)
        x = jax.random.normal(keys[0], (frames, height, height, channels), jnp.bfloat16)
        kernel = jax.random.normal(keys[1], (3, 3, channels, out), jnp.bfloat16) * (9 * channels) ** -0.5
        bias = jax.random.normal(keys[2], (out,), jnp.float32)

        def xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, phases: bool = to_phases) -> jax.Array:
            y = jax.nn.silu(nn.conv3x3(x, kernel).astype(bias.dtype) + bias).astype(x.dtype)
            return nn.space_to_depth(y) if phases else y

        expected = jax.jit(xla)(x, kernel, bias)
        cells = frames * height * height
        floor = floor_ms(2.0 * cells * 9 * channels * out, 2.0 * cells * (channels + out))
        run = functools.partial(jax.jit(xla), x, kernel, bias)
        rows.append({"name": f"layer_{i}", "implementation": "xla", "ms": common.queued_ms(run), "floor_ms": floor})
        for rows_, warps, stages in tilings:
            fused = functools.partial(
                fused_convolution.conv3x3_silu, to_phases=to_phases, rows=rows_, warps=warps, stages=stages
            )
            run = functools.partial(jax.jit(fused), x, kernel, bias)
            error = jnp.abs(run().astype(jnp.float32) - expected.astype(jnp.float32)).max()
            rows.append(
                {
                    "name": f"layer_{i}",
                    "implementation": f"fused rows={rows_} warps={warps} stages={stages}",
                    "ms": common.queued_ms(run),
                    "floor_ms": floor,
                    "max_error": float(error),
                }
            )
            print(rows[-1], flush=True)
    return rows


def pass_rows(frames: int, context: int) -> list[dict[str, Any]]:
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
    return [
        {"name": name, "frames": count, "ms": common.queued_ms(functools.partial(jax.jit(function), params))}
        for name, (function, count) in functions.items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2048, help="frames of a training batch")
    parser.add_argument("--context", type=int, default=8192, help="context frames of an imagination")
    parser.add_argument("--tilings", action="store_true", help="try more tilings of the fused kernel")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    tilings = [(fused_convolution.ROWS, fused_convolution.WARPS, fused_convolution.STAGES)]
    if arguments.tilings:
        tilings = list(itertools.product((64, 128, 256), (4, 8), (3,)))
    on_gpu = jax.default_backend() == "gpu"
    rows = layer_rows(arguments.context, tilings if on_gpu else [])
    rows += pass_rows(arguments.frames, arguments.context)
    common.write_result("autoencoder", rows, arguments.out)


if __name__ == "__main__":
    main()
