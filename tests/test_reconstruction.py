"""The reconstruction losses: literal values, and written-out gradients against automatic ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import vae
from drama_jax.config import AutoencoderConfig
from drama_jax.world_model.reconstruction import reconstruction_loss

B, T = 2, 3
CONFIG = AutoencoderConfig(image_size=4, image_channels=1, depths=(2, 2), categoricals=2, classes=2)
CROSS = AutoencoderConfig(
    image_size=4, image_channels=1, depths=(2, 2), categoricals=2, classes=2, reconstruction="cross_entropy"
)
VECTOR = AutoencoderConfig(vector_size=5, categoricals=2, classes=2)


def frames(config, seed=0):
    rng = np.random.default_rng(seed)
    if config.vector_size:
        return jnp.asarray(rng.normal(size=(B, T, *config.frame_shape)), jnp.float32)
    return jnp.asarray(rng.integers(256, size=(B, T, *config.frame_shape)), jnp.uint8)


def decoded(config, seed=1):
    shape = (B, T, 5) if config.vector_size else (B, T, 2, 2, 4)
    return jnp.asarray(np.random.default_rng(seed).uniform(0.01, 0.99, shape))


def test_literal_values():
    half = jnp.full((1, 1, 2, 2, 4), 0.5)
    on = jnp.zeros((1, 1, 4, 4, 1), jnp.uint8).at[0, 0, 1, 2].set(255)
    np.testing.assert_allclose(reconstruction_loss(CONFIG, half, on), 16 * 0.25)
    np.testing.assert_allclose(reconstruction_loss(CROSS, half, on), 16 * np.log(2), rtol=1e-5)
    # The cell of row 1, column 2: phase (1, 0) of cell (0, 1).
    exact = jnp.zeros((1, 1, 2, 2, 4)).at[0, 0, 0, 1, 2].set(1.0)
    np.testing.assert_allclose(reconstruction_loss(CONFIG, exact, on), 0)
    np.testing.assert_allclose(reconstruction_loss(CROSS, exact, on), 0, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, VECTOR], ids=["image", "vector"])
def test_gradient_of_the_squared_error_is_the_automatic_one(config, x64):
    seen, x = frames(config), decoded(config)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(B, T)))

    def plain(x):
        target = vae.to_inputs(config, seen.reshape(-1, *config.frame_shape), x.dtype).reshape(x.shape)
        return jnp.sum(weights * jnp.square(x - target).reshape(B, T, -1).sum(-1))

    ours = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * reconstruction_loss(config, x, seen))))(x)
    for mine, automatic in zip(ours, jax.jit(jax.value_and_grad(plain))(x)):
        # A vector's symlog is of float32, and rounds as the compiler likes.
        tolerance = {"atol": 1e-6} if config.vector_size else {"rtol": 1e-12}
        np.testing.assert_allclose(mine, automatic, **tolerance)


def test_cross_entropy_moves_a_pixel_that_the_squared_error_leaves_alone(x64):
    # A lit pixel decoded as 1e-4: its logit's gradient is -1 for the one, 2e-4 of that for the other.
    on = jnp.full((1, 1, 4, 4, 1), 255, jnp.uint8)

    def by_logit(config):
        return jax.grad(lambda u: reconstruction_loss(config, jax.nn.sigmoid(u), on).sum())(logits)

    logits = jnp.full((1, 1, 2, 2, 4), jnp.log(1e-4 / (1 - 1e-4)))
    np.testing.assert_allclose(by_logit(CROSS), -1, rtol=0.02)
    np.testing.assert_allclose(by_logit(CONFIG), -2e-4, rtol=0.02)


@pytest.mark.parametrize("channels", [8, 12, 16])
def test_biased_sigmoid_has_the_automatic_gradients(channels, x64):
    rng = np.random.default_rng(0)
    y, bias = jnp.asarray(rng.normal(size=(3, 2, 2, channels))), jnp.asarray(rng.normal(size=2))
    weights = jnp.asarray(rng.normal(size=(3, 2, 2, 8)))

    def plain(y, bias):
        return jnp.sum(weights * jax.nn.sigmoid(y[..., :8] + jnp.tile(bias, 4)))

    ours = jax.jit(jax.grad(lambda y, bias: jnp.sum(weights * vae.biased_sigmoid(y, bias, 4)), (0, 1)))(y, bias)
    for mine, automatic in zip(ours, jax.grad(plain, (0, 1))(y, bias)):
        np.testing.assert_allclose(mine, automatic, rtol=1e-12, atol=1e-15)
