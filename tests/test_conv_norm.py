"""The two-pass kernels of `benchmarks.conv_norm`: their results when interpreted, and their lowering."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import conv_norm
from tests.tools import lower_for_cuda

FUNCTIONS = {"forward": conv_norm.forward, "backward": conv_norm.backward}


# An odd number of images: the last program has one, not two. Eight columns: eight images, of which five are missing.
@pytest.mark.parametrize(("frames", "side"), [(3, 32), (11, 8)])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_two_passes_equal_the_package(case, frames, side):
    operands = conv_norm.operands(case, frames, side)
    function = functools.partial(FUNCTIONS[case], cut=conv_norm.Cut(4, 1), interpret=True)
    found = jax.jit(function)(*operands)
    wide = [array.astype(jnp.float32) for array in operands]
    expected = jax.jit(functools.partial(conv_norm.package, case))(*wide)
    assert conv_norm.error(found, expected) < 2**-7  # rounded to 8 bits on the way, and at the end
    # With nothing rounded, the same numbers.
    exact = jax.jit(function)(*wide)
    assert conv_norm.error(exact, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize("name", conv_norm.CUTS)
def test_every_cut_lowers_for_a_gpu(name):
    for case, function in FUNCTIONS.items():
        abstract = jax.eval_shape(functools.partial(conv_norm.operands, case, conv_norm.FRAMES, conv_norm.SIDE))
        text = lower_for_cuda(functools.partial(function, cut=conv_norm.CUTS[name]), *abstract)
        assert text.count("__gpu$xla.gpu.triton") == 2
