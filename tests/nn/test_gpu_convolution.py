"""The GPU convolutions by Triton: interpreted against XLA, and their lowering for CUDA."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import nn
from drama_jax.nn import gpu_convolution, gpu_convolution_triton
from drama_jax.nn.convolution import conv3x3
from drama_jax.nn.gpu_convolution_gradient import kernel_gradient
from drama_jax.nn.gpu_convolution_triton import conv3x3 as gpu_conv3x3
from tests.tools import lower_for_cuda

SHAPES = [
    # images, height, width, in, out: both kernels, odd numbers of images, channels that need padding
    (1, 8, 8, 16, 64),
    (5, 4, 32, 16, 24),
    (19, 2, 4, 64, 32),
    (3, 4, 4, 128, 48),
    (2, 8, 2, 80, 16),
]
BLOCKS = [shape for shape in SHAPES if shape[3] > 64]


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
    actual = gpu_conv3x3(x, kernel, bias, silu=True, to_phases=to_phases, interpret=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to_phases", [False, True])
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_of_many_images_it_is_the_same(shape, to_phases, monkeypatch):
    run = functools.partial(gpu_conv3x3.__wrapped__, silu=True, to_phases=to_phases, interpret=True)  # traced each time
    few = run(*inputs(shape))
    monkeypatch.setattr(gpu_convolution_triton, "FEW", 0)
    many = run(*inputs(shape))
    np.testing.assert_allclose(many, few, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("from_phases", "to_phases"), [(True, False), (False, True)])
def test_in_training_the_kernel_writes_phases_both_ways(from_phases, to_phases, monkeypatch):
    asked = []

    def interpreted(x, kernel, *, from_phases, to_phases):
        asked.append(to_phases)
        x = nn.depth_to_space(x) if from_phases else x
        return gpu_conv3x3(x, kernel, jnp.zeros(kernel.shape[-1]), to_phases=to_phases, interpret=True)

    # Forward 64 to 32 channels, or by the input 64 from 32, is the kernel's; what else there is, XLA's.
    channels, out = (32, 64) if from_phases else (64, 32)
    x, kernel, _ = inputs((2, 4, 4, channels, out), jnp.bfloat16)
    x = nn.space_to_depth(x) if from_phases else x
    run = functools.partial(conv3x3, from_phases=from_phases, to_phases=to_phases)
    expected, pull_expected = jax.vjp(run, x, kernel)
    gradient = jax.random.normal(jax.random.key(0), expected.shape, jnp.bfloat16)
    monkeypatch.setattr(gpu_convolution, "available", lambda: True)
    monkeypatch.setattr(gpu_convolution, "conv3x3", interpreted)
    found, pull = jax.vjp(run, x, kernel)
    for a, e in zip((found, *pull(gradient)), (expected, *pull_expected(gradient)), strict=True):
        wide = np.asarray(e, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), wide, atol=2**-7 * np.abs(wide).max())
    assert asked and all(asked)


def test_without_an_end_it_is_the_convolution():
    x, kernel, _ = inputs((2, 4, 4, 16, 16))
    plain = gpu_conv3x3(x, kernel, jnp.zeros(16), interpret=True)
    np.testing.assert_allclose(plain, conv3x3(x, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("from_phases", "to_phases"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1, 4, 4, 16, 64), (5, 6, 32, 32, 16), (530, 2, 32, 16, 16)], ids=str)
def test_interpreted_kernel_gradient_equals_xla(shape, from_phases, to_phases):
    x, kernel, _ = inputs(shape)
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=(*x.shape[:3], kernel.shape[-1])), x.dtype)
    (expected,) = jax.vjp(lambda k: conv3x3(x, k), kernel)[1](gradient)
    scale = jnp.abs(expected).max()
    x = nn.space_to_depth(x) if from_phases else x
    gradient = nn.space_to_depth(gradient) if to_phases else gradient
    found = kernel_gradient(x, gradient, from_phases=from_phases, to_phases=to_phases, interpret=True)
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_vmap_over_weights_equals_loop():
    x, kernel, bias = inputs((2, 4, 4, 16, 8))
    stacked = [jnp.stack([a, a + 1]) for a in (x, kernel, bias)]
    run = lambda *args: gpu_conv3x3(*args, silu=True, interpret=True)  # noqa: E731
    batched = jax.vmap(run)(*stacked)
    for i in range(2):
        np.testing.assert_allclose(batched[i], run(*(a[i] for a in stacked)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 2, 12, 8), (1, 4, 3, 16, 8), (1, 2, 4, 128, 8), (1, 4, 4, 48, 8)], ids=str)
def test_other_shapes_are_refused(shape):
    x, kernel, bias = inputs(shape)
    with pytest.raises(ValueError, match="w a divisor of 64"):
        gpu_conv3x3(x, kernel, bias)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(
    "shape", [(16, 32, 32, 16, 64), (8, 32, 32, 64, 32), (8, 16, 16, 128, 48), (512, 16, 16, 128, 48)], ids=str
)
def test_lowers_for_cuda(shape):
    x, kernel, bias = inputs(shape, jnp.bfloat16)
    assert "triton" in lower_for_cuda(lambda *args: gpu_conv3x3(*args, silu=True, to_phases=True), x, kernel, bias)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_kernel_gradient_lowers_for_cuda():
    x, kernel, _ = inputs((8, 32, 32, 64, 32), jnp.bfloat16)
    assert "triton" in lower_for_cuda(kernel_gradient, x, conv3x3(x, kernel))


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [
        ("cpu", None, False),
        ("gpu", "9.0", True),
        ("gpu", "8.0", False),
        ("gpu", "12.0", False),
        ("gpu", "gfx942", False),
    ],
)
def test_only_hopper_gpus_use_the_kernels(monkeypatch, backend, capability, expected):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert gpu_convolution.available() == expected
