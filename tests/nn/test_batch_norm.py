"""Batch normalisation with SiLU: the written-out gradient against automatic differentiation, and the statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.nn.batch_norm import BatchNorm, across, normalise_silu, rearrange

EPSILON = 1e-5


def plain(y, gamma, beta, phases):
    """The same function step by step, for automatic differentiation."""
    channels = y.reshape(*y.shape[:-1], phases, -1)
    axes = tuple(range(channels.ndim - 1))
    mean, var = channels.mean(axis=axes), channels.var(axis=axes)
    return jax.nn.silu((channels - mean) / jnp.sqrt(var + EPSILON) * gamma + beta).reshape(y.shape)


def inputs(phases, channels=3):
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(5, 2, 4, phases * channels)) * 2 + 1)
    return y, jnp.asarray(rng.normal(size=channels)), jnp.asarray(rng.normal(size=channels)), rng


@pytest.mark.parametrize(("phases", "layout"), [(1, "same"), (1, "phases"), (4, "pixels")])
def test_value_and_gradients_equal_automatic_differentiation(x64, phases, layout):
    y, gamma, beta, rng = inputs(phases)
    weight = jnp.asarray(rng.normal(size=rearrange(y, layout).shape))

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda *args: (function(*args) * weight).sum(), argnums=(0, 1, 2)))

    ours = loss(lambda *args: normalise_silu(*args, phases, EPSILON, layout)[0])(y, gamma, beta)
    expected = loss(lambda *args: rearrange(plain(*args, phases), layout))(y, gamma, beta)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_vmap_equals_loop(x64):
    y, gamma, beta, _ = inputs(1)
    stacked = [jnp.stack([a, a * 2 + 1]) for a in (y, gamma, beta)]
    gradient = jax.grad(lambda *args: normalise_silu(*args, 1, EPSILON)[0].sum() ** 2)
    batched = jax.vmap(gradient)(*stacked)
    for i in range(2):
        np.testing.assert_allclose(batched[i], gradient(*(a[i] for a in stacked)), rtol=1e-10)


def test_statistics_and_evaluation_mode(x64):
    y, _, _, _ = inputs(4)
    offset = jnp.asarray([1.0, -2.0, 0.5])
    norm = BatchNorm(3, phases=4, param_dtype=jnp.float64)
    fresh = norm.init(jax.random.key(0), y, offset, method="train_silu")
    np.testing.assert_array_equal(fresh["batch_stats"]["mean"], np.zeros(3))
    _, moved = norm.apply(fresh, y, offset, method="train_silu", mutable=["batch_stats"])
    pixels = np.asarray(y).reshape(-1, 3)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * (pixels.mean(0) + offset), rtol=1e-12)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 + 0.1 * pixels.var(0, ddof=1), rtol=1e-12)
    scale, shift = norm.apply({**fresh, **moved}, offset, method="folded")
    mean, var = moved["batch_stats"]["mean"], moved["batch_stats"]["var"]
    expected = (pixels + offset - mean) / np.sqrt(var + EPSILON)
    np.testing.assert_allclose(pixels * scale + shift, expected, rtol=1e-12)


def test_numbers_per_channel_are_laid_out_for_all_phases():
    scale, shift = across(2, jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([4.0, 5.0, 6.0]))
    np.testing.assert_array_equal(scale, [1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(shift, [4, 5, 6, 4, 5, 6])


@pytest.mark.parametrize(("backend", "barriers"), [("cpu", 1), ("gpu", 0)])
def test_only_a_cpu_holds_them_in_memory(backend, barriers, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jaxpr = jax.make_jaxpr(lambda x: across(4, x, x))(jnp.ones(3))
    assert str(jaxpr).count("optimization_barrier") == barriers
