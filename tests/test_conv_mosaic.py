"""The Mosaic GPU kernel of `benchmarks.conv_mosaic`: its results when interpreted, and its lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import conv_mosaic
from benchmarks.conv_mosaic import CASES, CUTS, Cut
from tests.tools import lower_for_cuda, quick_jit

ELEVEN = jax.__version_info__ >= (0, 11)
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="before jax 0.11 only jax._src has the GPU interpreter"
)


def operands(frames, height, width, channels, out):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(frames, height, width, channels))
    kernel = rng.normal(size=(3, 3, channels, out)) * (9 * channels) ** -0.5
    return (
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(kernel, jnp.bfloat16),
        jnp.asarray(rng.normal(size=out), jnp.float32),
    )


# More columns than places in shared memory, several blocks of channels, a last group of images that is not full. Two
# warpgroups at most: the interpreter has them wait for each other in threads of which there are as many as processors.
@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "ends", "cut"),
    [
        ((64, 4, 4, 64, 32), True, Cut(rows=2)),
        ((64, 2, 2, 128, 48), True, Cut(rows=1, parts=2, stages=3, behind=2)),
        ((65, 2, 4, 16, 16), False, Cut(rows=2, stages=2)),
    ],
    ids=["rows", "halves", "plain"],
)
def test_the_kernel_equals_xla(shape, ends, cut):
    x, kernel, bias = operands(*shape)
    found = conv_mosaic.conv3x3(
        x, kernel, bias, ends=ends, cut=cut, interpret=plgpu.InterpretGPUParams(detect_races=True)
    )
    wide = (array.astype(jnp.float32) for array in (x, kernel))
    expected = np.asarray(quick_jit(conv_mosaic.reference, static_argnames="ends")(*wide, bias, ends=ends))
    assert found.shape == expected.shape and found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found.astype(jnp.float32)) - expected).max() < 2**-8 * np.abs(expected).max()


@pytest.mark.skipif(not ELEVEN, reason="before jax 0.11 Mosaic GPU does not lower without the GPU's jaxlib")
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("case", ["layer_1", "conv_16_64"])
def test_every_cut_lowers_for_a_gpu(name, case):
    frames, height, channels, out, ends = CASES[case]
    x = jax.ShapeDtypeStruct((frames, height, height, channels), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, out), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((out,), jnp.float32)
    text = lower_for_cuda(lambda *operands: conv_mosaic.conv3x3(*operands, ends=ends, cut=CUTS[name]), x, kernel, bias)
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("shape", "cut"), [((64, 4, 4, 48, 32), Cut()), ((64, 6, 4, 64, 32), Cut(rows=4)), ((64, 4, 4, 64, 40), Cut())]
)
def test_other_sizes_are_refused(shape, cut):
    with pytest.raises(ValueError, match="sizes"):
        jax.eval_shape(lambda: conv_mosaic.conv3x3(*operands(*shape), ends=True, cut=cut))
