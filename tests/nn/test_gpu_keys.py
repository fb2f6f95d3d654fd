"""The kernel that lays a rollout's keys apart, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.nn import gpu_keys
from tests.tools import lower_for_cuda

apart = jax.jit(functools.partial(gpu_keys.apart, interpret=True))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_are_those_of_the_array_in_its_order(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), (3, 2))
    single = apart(keys)
    assert len(single) == 6 and all(key.shape == () and key.dtype == keys.dtype for key in single)
    for key, expected in zip(single, keys.reshape(-1)):
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_vmap_equals_a_loop():
    keys = jax.random.split(jax.random.key(4), (5, 2, 2))
    batched = jax.vmap(apart)(keys)
    for seed in range(5):
        for key, expected in zip(batched, apart(keys[seed])):
            np.testing.assert_array_equal(jax.random.key_data(key[seed]), jax.random.key_data(expected))


def test_it_serves_on_a_gpu_only(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 2)
    assert not gpu_keys.serves(keys)
    monkeypatch.setattr(gpu_keys.gpu_convolution, "available", lambda: True)
    assert gpu_keys.serves(keys)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_it_lowers_for_cuda():
    def run(data):
        return [jax.random.key_data(key) for key in gpu_keys.apart(jax.random.wrap_key_data(data))]

    assert "keys_apart" in lower_for_cuda(run, jax.ShapeDtypeStruct((16, 2, 2), jnp.uint32))
