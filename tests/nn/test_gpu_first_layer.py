"""The first layer's kernels, one each way: interpreted against the passes of XLA, and their lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.nn import gpu_convolution, gpu_first_layer, gpu_first_layer_forward
from drama_jax.nn.batch_norm import conv_normalise_silu, normalise_silu
from drama_jax.nn.convolution import conv3x3
from drama_jax.vae import ConvBlock
from tests.tools import lower_for_cuda

EPSILON = 1e-5
SHAPES = [
    (3, 4, 16, 32),  # images, height, width, features: a group with a place for one more image; two blocks of outputs
    (267, 2, 32, 4),  # more groups than programs, the last of them without an image
]


def inputs(shape, dtype=jnp.float32, offset=0.5, seed=0):
    """Frames, which are no less than zero, kernel, gamma, beta, and the gradient of the activation."""
    images, height, width, features = shape
    rng = np.random.default_rng(seed)
    out = 4 * features
    frames = rng.uniform(size=(images, height, width, 16)).astype(np.float32)
    frames[..., 12:] = 0
    kernel = rng.normal(size=(3, 3, 16, out)) / 10
    gamma, beta = 1 + rng.normal(size=features) / 4, rng.normal(size=features)
    weight = rng.normal(size=(images, height, width, out)) + offset
    x, kernel, weight = (jnp.asarray(array, dtype) for array in (frames, kernel, weight))
    return x, kernel, jnp.asarray(gamma, jnp.float32), jnp.asarray(beta, jnp.float32), weight


def in_use(x, kernel, gamma, beta):
    return normalise_silu(conv3x3(x, kernel), gamma, beta, 4, EPSILON)


def in_one_pass(x, kernel, gamma, beta):
    return conv_normalise_silu(x, kernel, gamma, beta, 4, EPSILON, True)


def gradients(function, x, kernel, gamma, beta, weight):
    """Value, statistics, and gradients by all four, the input included."""
    result, pull = jax.vjp(function, x, kernel, gamma, beta)
    return result, pull((weight, jnp.zeros_like(gamma), jnp.zeros_like(beta)))


@functools.cache
def compiled(function):
    return jax.jit(functools.partial(gradients, function))


@functools.cache
def strictly_rounded(function):
    """Compiled with every rounding to bfloat16 that is written: XLA's CPU backend leaves some out by default."""
    options = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
    return jax.jit(functools.partial(gradients, function), compiler_options=options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_equals_the_passes_of_xla(shape):
    (expected, by_expected), (actual, by_actual) = (compiled(f)(*inputs(shape)) for f in (in_use, in_one_pass))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
    for name, a, b in zip(("x", "kernel", "gamma", "beta"), by_actual, by_expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()), err_msg=name)


def test_in_bfloat16_it_is_as_close_to_float32():
    distances = []  # of the path in use and of ours: value, mean, variance; gradients by kernel, gamma and beta
    for seed in range(4):
        rounded = inputs((9, 8, 32, 16), jnp.bfloat16, 0.1, seed)
        wide = (array.astype(jnp.float32) for array in rounded)
        exact, now, new = (
            (*values, *by[1:])
            for values, by in (compiled(in_use)(*wide), *(strictly_rounded(f)(*rounded) for f in (in_use, in_one_pass)))
        )
        scales = [jnp.linalg.norm(e) for e in exact]
        distances.append(
            [[jnp.linalg.norm(g.astype(e.dtype) - e) / s for g, e, s in zip(a, exact, scales)] for a in (now, new)]
        )
    now, new = np.sqrt(np.mean(np.square(distances), axis=0))
    assert (new < 1.01 * now).all(), (now, new)
    assert (now < 4e-3).all(), now


def test_vmap_equals_loop():
    stacked = [jnp.stack([array, array[::-1] * 0.5]) for array in inputs(SHAPES[0])]
    batched = jax.jit(jax.vmap(functools.partial(gradients, in_one_pass)))(*stacked)
    for i in range(2):
        single = compiled(in_one_pass)(*(array[i] for array in stacked))
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("size", "channels", "out", "dtype", "expected"),
    [
        (32, 12, 64, jnp.bfloat16, True),  # preset xs
        (32, 12, 128, jnp.bfloat16, True),  # preset s
        (32, 16, 64, jnp.bfloat16, True),  # four colours
        (32, 12, 64, jnp.float32, False),
        (32, 12, 64, jnp.float64, False),
        (32, 12, 96, jnp.bfloat16, False),
        (32, 20, 64, jnp.bfloat16, False),
        (48, 12, 64, jnp.bfloat16, False),
        (16, 12, 16, jnp.bfloat16, False),  # preset tiny
    ],
)
def test_shapes_served(size, channels, out, dtype, expected):
    assert gpu_first_layer.serves(jax.ShapeDtypeStruct((7, size, size, channels), dtype), out) == expected


@pytest.mark.parametrize("shape", [(1, 2, 2, 12, 16), (1, 2, 48, 16, 16), (1, 2, 2, 16, 48)], ids=str)
def test_other_shapes_are_refused(shape):
    *cells, channels, out = shape
    y, vector = jnp.zeros((*cells, out)), jnp.zeros(out)
    with pytest.raises(ValueError, match="gpu_first_layer_forward.conv3x3_and_sums needs I 16, w a divisor of 64"):
        gpu_first_layer_forward.conv3x3_and_sums(jnp.zeros((*cells, channels)), jnp.zeros((3, 3, channels, out)))
    with pytest.raises(ValueError, match="gpu_first_layer.sums needs I 16, w a divisor of 64"):
        gpu_first_layer.sums(jnp.zeros((*cells, channels)), y, y, vector, vector)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("features", "kind", "dtype", "available", "seeds", "expected"),
    [
        (16, "stride1", jnp.bfloat16, True, None, True),
        (16, "stride1", jnp.bfloat16, True, 3, True),
        (32, "stride1", jnp.bfloat16, True, None, True),
        (16, "stride1", jnp.float32, True, None, False),
        (16, "stride1", jnp.bfloat16, False, None, False),
        (64, "stride2", jnp.bfloat16, True, None, False),
    ],
)
def test_which_layer_uses_it(monkeypatch, features, kind, dtype, available, seeds, expected):
    """Training's first layer, where there is such a GPU, in bfloat16; the kernels lower for CUDA."""
    monkeypatch.setattr(gpu_convolution, "available", lambda: available)
    block = ConvBlock(features, kind, dtype)
    x = jnp.zeros((3, 32, 32, 12), dtype)
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), x, True))

    def loss(params, x):
        variables_ = {**variables, "params": params}
        return block.apply(variables_, x, True, mutable=["batch_stats"])[0].astype(jnp.float32).sum()

    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    arguments, gradient = (variables["params"], x), jax.grad(loss)
    if seeds is not None:
        arguments = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), arguments)
        gradient = jax.vmap(gradient)
    text = lower_for_cuda(gradient, *arguments)
    for kernel in ("first_layer_16", "first_layer_gradient_16"):
        assert (kernel in text) == expected


@pytest.mark.parametrize("shape", [(5, 3, 8, 64), (3, 4, 32, 128)], ids=str)
def test_convolution_and_its_sums(shape):
    """Columns of eight: three of eight images are missing; 128 outputs: two blocks."""
    images, height, width, out = shape
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(images, height, width, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 16, out)) / 10, jnp.bfloat16)
    y, sums = jax.jit(functools.partial(gpu_first_layer_forward.conv3x3_and_sums, interpret=True))(x, kernel)
    wide = conv3x3(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-8, atol=1e-6)
    rounded = np.asarray(y, np.float64).reshape(-1, out)
    np.testing.assert_allclose(sums, [rounded.sum(axis=0), np.square(rounded).sum(axis=0)], rtol=1e-5, atol=1e-4)
