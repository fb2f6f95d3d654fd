"""A Mamba-2 rollout on a Hopper GPU: context and steps as a few kernels of our own and cuBLAS products.

`Mamba2Backbone.open_window` and `step` come here where `serves` says so; the results differ from the general form by
roundings of the compute dtype. A step of two layers is 9 kernels instead of 24.

Shapes: B batch, T context steps, L horizon, S latent, D width, J and I as in `gpu_mixer`.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import jax.typing

from drama_jax.backbones import gpu_dense, gpu_mixer
from drama_jax.config import BackboneConfig
from drama_jax.nn import gpu_convolution
from drama_jax.nn.gpu_sample import is_power_of_two

Params = dict[str, Any]


@flax.struct.dataclass
class GpuWindow:
    """What the backbone remembers during a rollout of bounded length, as the kernels want it."""

    layers: tuple[gpu_mixer.GpuLayerWindow, ...]  # one per layer
    classes: int = flax.struct.field(pytree_node=False)  # C: latents of steps to come are one-hot in groups of C


def serves(config: BackboneConfig, dtype: jax.typing.DTypeLike, latent_size: int, classes: int) -> bool:
    """Whether the kernels run here and take these sizes."""
    sizes = (config.num_heads, config.head_dim, config.state_dim, classes, latent_size // classes)
    fits = all(map(is_power_of_two, (*sizes, config.width)))
    return gpu_convolution.available() and dtype == jnp.bfloat16 and fits


def open_window(
    config: BackboneConfig,
    params: Params,
    residual: jax.Array,
    index: jax.Array,
    *,
    horizon: int,
    classes: int,
    eps: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, GpuWindow]:
    """Blocks and final norm over a context that starts from nothing.

    Args:
      config: sizes; static.
      params: of the backbone.
      residual: [B, T, D], the stem's output.
      index: [B, T] int32 segment index.
      horizon: how many steps may follow.
      classes: C of the latents to come.
      eps: of the norms.
      dtype: compute dtype.

    Returns:
      d_t [B, T, D] in the dtype of `residual`, and the window.
    """
    windows = []
    for layer in _layers(config, params):
        mixer = layer["mixer"]
        projected = _dense(_normed(residual, layer["norm"], eps).astype(dtype), mixer["in_proj"])
        weights = gpu_mixer.MixerWeights.of(mixer)
        normed, window = gpu_mixer.mixer_context(projected, index, weights, horizon=horizon, epsilon=eps)
        residual = residual + _dense(normed, mixer["out_proj"]).astype(residual.dtype)
        windows.append(window)
    return _normed(residual, params["norm_f"], eps), GpuWindow(tuple(windows), classes)


def step(
    config: BackboneConfig,
    params: Params,
    latent: jax.Array,
    action: jax.Array,
    window: GpuWindow,
    *,
    eps: tuple[float, float],
) -> tuple[jax.Array, GpuWindow]:
    """One step of the rollout.

    Args:
      config: sizes; static.
      params: of the backbone.
      latent: [B, S] of the compute dtype, exactly one-hot.
      action: [B] int32.
      window: of the steps before.
      eps: of the stem's norm and of all others.

    Returns:
      d_t [B, D] in the compute dtype, and the window after the step.
    """
    layers = _layers(config, params)
    scales = [layer["norm"]["scale"] for layer in layers[1:]] + [params["norm_f"]["scale"]]
    first = layers[0]["norm"]["scale"]
    residual, normed = gpu_dense.embed(latent, action, params["stem"], first, classes=window.classes, eps=eps)
    windows = []
    for layer, past, scale in zip(layers, window.layers, scales, strict=True):
        mixer = layer["mixer"]
        weights = gpu_mixer.MixerWeights.of(mixer)
        mixed, new = gpu_mixer.mixer_step(_dense(normed, mixer["in_proj"]), past, weights, epsilon=eps[1])
        residual, normed = gpu_dense.add(residual, _dense(mixed, mixer["out_proj"]), scale, eps=eps[1])
        windows.append(new)
    return normed, GpuWindow(tuple(windows), window.classes)


def _layers(config: BackboneConfig, params: Params) -> list[Params]:
    return [params[f"layers_{i}"] for i in range(config.num_layers)]


def _dense(x: jax.Array, params: Params) -> jax.Array:
    return jnp.matmul(x, params["kernel"].astype(x.dtype))


def _normed(x: jax.Array, params: Params, eps: float) -> jax.Array:
    return x * (params["scale"] * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps))
