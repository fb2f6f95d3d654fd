"""The sampling kernel, interpreted, draws what the plain form draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import distributions
from drama_jax.nn import gpu_sample
from tests.tools import lower_for_cuda

KEY = jax.random.key(0)
B, K, C = 37, 8, 16


@pytest.fixture(scope="module")
def inputs():
    raw_key, bias_key = jax.random.split(jax.random.key(1))
    return 3 * jax.random.normal(raw_key, (B, K * C)), jax.random.normal(bias_key, (K * C,))


@jax.jit
def plain(key, raw, bias):
    log_probs = distributions.unimix((raw + bias).reshape(*raw.shape[:-1], K, C), 0.01)
    return distributions.sample_one_hot(key, log_probs).reshape(raw.shape)


kernel = jax.jit(functools.partial(gpu_sample.sample_latent, classes=C, unimix=0.01, interpret=True))


def test_draws_are_those_of_jax(inputs):
    expected = plain(KEY, *inputs)
    np.testing.assert_array_equal(kernel(KEY, *inputs), expected)
    np.testing.assert_array_equal(expected.reshape(B, K, C).sum(-1), 1)


def test_leading_axes_draw_as_rows_do(inputs):
    raw, bias = inputs
    raw = raw[:36].reshape(4, 9, K * C)
    np.testing.assert_array_equal(kernel(KEY, raw, bias), plain(KEY, raw, bias))


def test_vmap_over_seeds_equals_a_loop(inputs):
    keys = jax.random.split(KEY, 3)
    batched = jax.vmap(kernel, in_axes=(0, None, None))(keys, *inputs)
    for key, sample in zip(keys, batched, strict=True):
        np.testing.assert_array_equal(sample, plain(key, *inputs))


def test_gumbel_noise_is_that_of_jax():
    """Against the frequencies too: what is drawn has the probabilities asked for."""
    raw = jnp.broadcast_to(jnp.log(jnp.asarray([0.7, 0.1, 0.1, 0.1])), (2000, 4))
    draw = gpu_sample.sample_latent(KEY, raw, jnp.zeros(4), classes=4, unimix=0.0, interpret=True)
    np.testing.assert_allclose(draw.mean(axis=0), [0.7, 0.1, 0.1, 0.1], atol=4 * (0.7 * 0.3 / 2000) ** 0.5)


@pytest.mark.parametrize(
    ("impl", "shape", "classes", "dtype", "serves"),
    [
        ("threefry2x32", (5, 128), 16, jnp.bfloat16, True),
        ("threefry2x32", (5, 128), 16, jnp.float32, False),
        ("threefry2x32", (5, 96), 16, jnp.bfloat16, False),  # 6 categoricals
        ("threefry2x32", (5, 96), 12, jnp.bfloat16, False),
        ("rbg", (5, 128), 16, jnp.bfloat16, False),
    ],
)
def test_serves_only_where_it_draws_the_same(monkeypatch, impl, shape, classes, dtype, serves):
    raw = jax.ShapeDtypeStruct(shape, dtype)
    key = jax.random.key(0, impl=impl)
    assert not gpu_sample.serves(key, raw, classes)  # this is a CPU
    monkeypatch.setattr(gpu_sample.gpu_convolution, "available", lambda: True)
    assert gpu_sample.serves(key, raw, classes) == serves


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_lowers_for_cuda():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 1024), (1024,))]
    text = lower_for_cuda(functools.partial(gpu_sample.sample_latent, KEY, classes=32, unimix=0.01), *shapes)
    assert "triton" in text
