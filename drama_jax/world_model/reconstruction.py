"""How far decoded frames are from the frames (paper equation 3, first term). B batch, T time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from drama_jax import vae
from drama_jax.config import AutoencoderConfig

SMALL = 1e-6
"""Added to probabilities before their logarithm."""


def reconstruction_loss(config: AutoencoderConfig, reconstruction: jax.Array, frames: jax.Array) -> jax.Array:
    """The loss that `config.reconstruction` names, of each frame, summed over its pixels.

    Args:
      config: of the autoencoder; static.
      reconstruction: [B, T, ..] as `vae.decode` returns it, in at least float32.
      frames: [B, T, *frame], as they are stored.

    Returns:
      [B, T] in the dtype of `reconstruction`.
    """
    if config.reconstruction == "cross_entropy":
        return _cross_entropy(config, reconstruction, frames)
    return _squared_error(config, reconstruction, frames)


def _cross_entropy(config: AutoencoderConfig, reconstruction: jax.Array, frames: jax.Array) -> jax.Array:
    target = _target(config, reconstruction, frames)
    on, off = jnp.log(reconstruction + SMALL), jnp.log(1 - reconstruction + SMALL)
    return -_over_pixels(target * on + (1 - target) * off)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _squared_error(config: AutoencoderConfig, reconstruction: jax.Array, frames: jax.Array) -> jax.Array:
    return _over_pixels(jnp.square(reconstruction - _target(config, reconstruction, frames)))


def _squared_error_forward(
    config: AutoencoderConfig, reconstruction: jax.Array, frames: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _squared_error(config, reconstruction, frames), (reconstruction, frames)


def _squared_error_backward(
    config: AutoencoderConfig, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    reconstruction, frames = saved
    # Behind the barrier the difference is another one to XLA, which would write the forward pass's down in float32 and
    # read it three times.
    difference = reconstruction - _target(config, reconstruction, jax.lax.optimization_barrier(frames))
    return 2 * gradient.reshape(*gradient.shape, *(1,) * (reconstruction.ndim - 2)) * difference, None


_squared_error.defvjp(_squared_error_forward, _squared_error_backward)


def _target(config: AutoencoderConfig, reconstruction: jax.Array, frames: jax.Array) -> jax.Array:
    """The frames in the layout and dtype of the reconstruction."""
    inputs = vae.to_inputs(config, frames.reshape(-1, *config.frame_shape), reconstruction.dtype)
    return inputs.reshape(reconstruction.shape)


def _over_pixels(x: jax.Array) -> jax.Array:
    return x.sum(axis=tuple(range(2, x.ndim)))
