"""Polyphase convolutions against the direct forms, in float64: values, gradients, vmap over weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from drama_jax import nn

DIMS = ("NHWC", "HWIO", "NHWC")


def direct(x, kernel, stride):
    return lax.conv_general_dilated(x, kernel, (stride, stride), [(2, 2), (2, 2)], dimension_numbers=DIMS)


def direct_transposed(x, kernel, stride):
    """PyTorch's ConvTranspose2d(5, padding=2, output_padding=stride-1): dilate the input, correlate with the mirror."""
    high = 2 + stride - 1
    return lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), [(2, high), (2, high)], lhs_dilation=(stride, stride), dimension_numbers=DIMS
    )


FORMS = {
    "stride1": (lambda x, k: nn.depth_to_space(nn.conv_stride1(nn.space_to_depth(x), k)), lambda x, k: direct(x, k, 1)),
    "stride2": (lambda x, k: nn.conv_stride2(nn.space_to_depth(x), k), lambda x, k: direct(x, k, 2)),
    "transpose1": (
        lambda x, k: nn.depth_to_space(nn.conv_transpose_stride1(nn.space_to_depth(x), k)),
        lambda x, k: direct_transposed(x, k, 1),
    ),
    "transpose2": (
        lambda x, k: nn.depth_to_space(nn.conv_transpose_stride2(x, k)),
        lambda x, k: direct_transposed(x, k, 2),
    ),
}


def inputs(size=8, seeds=None):
    rng = np.random.default_rng(0)
    lead = () if seeds is None else (seeds,)
    x = jnp.asarray(rng.normal(size=(*lead, 2, size, size + 2, 3)))
    kernel = jnp.asarray(rng.normal(size=(*lead, 5, 5, 3, 4)))
    return x, kernel


@pytest.mark.parametrize("form", FORMS)
def test_equals_direct_form_with_gradients(x64, form):
    ours, oracle = FORMS[form]
    x, kernel = inputs()
    expected, pull_expected = jax.vjp(oracle, x, kernel)
    actual, pull_actual = jax.vjp(ours, x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape))
    for a, e in zip(pull_actual(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_weights_equals_loop(x64, form):
    ours, _ = FORMS[form]
    x, kernel = inputs(size=4, seeds=2)
    batched = jax.vmap(ours)(x, kernel)
    for i in range(2):
        np.testing.assert_allclose(batched[i], ours(x[i], kernel[i]), rtol=1e-12, atol=1e-12)


def by_way_of_pixels(x, kernel, from_phases, to_phases):
    y = nn.conv3x3(nn.depth_to_space(x) if from_phases else x, kernel)
    return nn.space_to_depth(y) if to_phases else y


@pytest.mark.parametrize(("from_phases", "to_phases"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])  # the latter pads channels
def test_phases_on_either_side_are_those_of_the_pixels(x64, from_phases, to_phases, dtype):
    rng = np.random.default_rng(0)
    shape = (2, 4, 6, 4 * 3) if from_phases else (2, 4, 6, 3)
    x = jnp.asarray(rng.integers(-4, 4, shape), dtype)
    kernel = jnp.asarray(rng.integers(-4, 4, (3, 3, 3, 5)), dtype)  # small whole numbers: exact in bfloat16 as well
    ours, pull = jax.vjp(functools.partial(nn.conv3x3, from_phases=from_phases, to_phases=to_phases), x, kernel)
    expected, pull_expected = jax.vjp(lambda *args: by_way_of_pixels(*args, from_phases, to_phases), x, kernel)
    np.testing.assert_array_equal(ours, expected)
    gradient = jnp.asarray(rng.integers(-1, 2, ours.shape), dtype)
    for a, e in zip(pull(gradient), pull_expected(gradient), strict=True):
        np.testing.assert_array_equal(a, e)


def test_phases_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="conv3x3: kernel must be"):
        nn.conv3x3(jnp.ones((1, 2, 2, 12)), jnp.ones((3, 3, 12, 4)), from_phases=True)


def test_transposed_by_hand():
    """One lit pixel paints the unmirrored kernel around its position, cut at the border."""
    x = jnp.zeros((1, 2, 2, 1)).at[0, 0, 1, 0].set(1.0)
    kernel = jnp.arange(25.0).reshape(5, 5, 1, 1)
    painted = nn.depth_to_space(nn.conv_transpose_stride2(x, kernel))[0, :, :, 0]
    expected = np.zeros((4, 4))
    expected[:3] = np.arange(25.0).reshape(5, 5)[2:, :4]
    np.testing.assert_array_equal(painted, expected)


def test_space_to_depth_round_trip_and_order():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    phases = nn.space_to_depth(x)
    np.testing.assert_array_equal(nn.depth_to_space(phases), x)
    np.testing.assert_array_equal(phases[0, 1, 2].reshape(2, 2, 3), x[0, 2:4, 4:6])


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_pads_channels_without_a_trace(form):
    """The padding of channels to eights changes neither shapes nor values."""
    ours, oracle = FORMS[form]
    x, kernel = (jnp.round(4 * a.astype(jnp.float32)).astype(jnp.bfloat16) for a in inputs(size=4))
    expected = oracle(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_allclose(ours(x, kernel).astype(jnp.float32), expected, rtol=1 / 128)
