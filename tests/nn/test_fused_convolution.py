"""The fused convolution: interpreted against XLA, and its lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from drama_jax import nn
from drama_jax.nn.convolution import conv3x3
from drama_jax.nn.fused_convolution import conv3x3_silu

SHAPES = [
    # images, height, width, in, out: the encoder's layers at a small size, and awkward ones
    (1, 8, 8, 16, 64),
    (3, 4, 4, 64, 32),
    (2, 6, 2, 48, 24),
]


def inputs(shape, dtype=jnp.float32):
    images, height, width, channels, out = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(images, height, width, channels)), dtype)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, out)) / 10, dtype)
    return x, kernel, jnp.asarray(rng.normal(size=out), jnp.float32)


@pytest.mark.parametrize("to_phases", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_equals_xla(shape, to_phases):
    x, kernel, bias = inputs(shape)
    expected = jax.nn.silu(conv3x3(x, kernel) + bias)
    expected = nn.space_to_depth(expected) if to_phases else expected
    actual = conv3x3_silu(x, kernel, bias, to_phases=to_phases, interpret=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_weights_equals_loop():
    x, kernel, bias = inputs((2, 4, 4, 16, 8))
    stacked = [jnp.stack([a, a + 1]) for a in (x, kernel, bias)]
    run = lambda *args: conv3x3_silu(*args, to_phases=False, interpret=True)  # noqa: E731
    batched = jax.vmap(run)(*stacked)
    for i in range(2):
        np.testing.assert_allclose(batched[i], run(*(a[i] for a in stacked)), rtol=1e-5, atol=1e-5)


def test_other_channel_counts_are_refused():
    x, kernel, bias = inputs((1, 2, 2, 12, 8))
    with pytest.raises(ValueError, match="multiples of 16, got 12"):
        conv3x3_silu(x, kernel, bias, to_phases=False)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize("shape", [(8, 32, 32, 16, 64), (8, 16, 16, 128, 48)], ids=str)
def test_lowers_for_cuda(shape):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    run = jax.jit(lambda x, kernel, bias: conv3x3_silu(x, kernel, bias, to_phases=True))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = run.trace(*inputs(shape, jnp.bfloat16)).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()
