"""The convolution through Mosaic: its results when interpreted, its lowering, and where it is used."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.conv_mosaic import CASES, CUTS, reference
from drama_jax import nn
from drama_jax.nn import gpu_convolution
from drama_jax.nn.gpu_convolution_mosaic import conv3x3, cut_for
from drama_jax.nn.gpu_convolution_mosaic_program import Cut, Form
from tests.tools import lower_for_cuda

needs_eleven = pytest.mark.skipif(
    not gpu_convolution.HAS_MOSAIC, reason="before jax 0.11 Mosaic GPU does not lower without the GPU's jaxlib"
)
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


def interpreted(x, kernel, bias, form, cut):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return conv3x3(x, kernel, bias, **dataclasses.asdict(form), cut=cut, interpret=interpret)


# More columns than places in shared memory, several blocks of channels, two groups of images. Two warpgroups at most:
# the interpreter has them wait for each other in threads of which there are as many as processors.
@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "form", "cut"),
    [
        ((64, 4, 4, 64, 32), Form(silu=True, to_phases=True), Cut(rows=2)),
        ((64, 2, 2, 128, 48), Form(to_phases=True), Cut(rows=1, parts=2, stages=3, behind=2)),
        ((128, 2, 4, 16, 16), Form(), Cut(rows=2, stages=2)),
        ((64, 4, 6, 32, 64), Form(from_phases=True), Cut(rows=2, stages=4, behind=2)),
        ((64, 2, 2, 128, 16), Form(silu=True, from_phases=True, to_phases=True), Cut(rows=1)),
    ],
    ids=["rows", "halves", "plain", "from-phases", "from-phases-in-blocks"],
)
def test_the_kernel_equals_xla(shape, form, cut):
    x, kernel, bias = operands(*shape)
    x = nn.space_to_depth(x) if form.from_phases else x
    found = interpreted(x, kernel, bias, form, cut)
    wide = (array.astype(jnp.float32) for array in (x, kernel))
    expected = np.asarray(jax.jit(functools.partial(reference, **dataclasses.asdict(form)))(*wide, bias))
    assert found.shape == expected.shape and found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found.astype(jnp.float32)) - expected).max() < 2**-8 * np.abs(expected).max()


@needs_interpreter
@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, 0)], ids=["kernels", "one-kernel"])
def test_vmap_equals_loop(mapped):
    x, kernel, bias = operands(128, 2, 2, 16, 16)
    stacked = [jnp.stack([a, -2 * a]) if axis == 0 else a for a, axis in zip((x, kernel, bias), mapped)]

    def run(*arrays):
        return interpreted(*arrays, Form(silu=True, to_phases=True), Cut(rows=2))

    found = jax.vmap(run, mapped)(*stacked)
    for i in range(2):
        alone = run(*(a[i] if axis == 0 else a for a, axis in zip(stacked, mapped)))
        np.testing.assert_array_equal(found[i], alone)


@needs_eleven
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("case", ["layer_1", "conv_32_64", "conv_16_64"])
def test_every_cut_lowers_for_a_gpu(name, case):
    *shape, form = CASES[case]
    run = functools.partial(conv3x3, **dataclasses.asdict(form), cut=CUTS[name])
    text = lower_for_cuda(run, *abstract(*shape, phases=form.from_phases))
    assert text.count("@mosaic_gpu") == 1


def abstract(frames, height, channels, out, batch=(), phases=False):
    image = (height // 2, height // 2, 4 * channels) if phases else (height, height, channels)
    return (
        jax.ShapeDtypeStruct((*batch, frames, *image), jnp.bfloat16),
        jax.ShapeDtypeStruct((*batch, 3, 3, channels, out), jnp.bfloat16),
        jax.ShapeDtypeStruct((*batch, out), jnp.float32),
    )


@needs_eleven
def test_several_seeds_are_one_kernel():
    run = lambda *arrays: gpu_convolution.conv3x3(*arrays, silu=True, to_phases=True)  # noqa: E731
    text = lower_for_cuda(jax.vmap(run), *abstract(2048, 16, 128, 48, (3,)))
    assert text.count("@mosaic_gpu") == 1 and "triton" not in text


@needs_eleven
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(("channels", "out", "from_phases"), [(32, 64, True), (64, 32, False)], ids=str)
def test_in_training_phases_go_in_and_out_of_kernels_only(channels, out, from_phases, monkeypatch):
    monkeypatch.setattr(gpu_convolution, "available", lambda: True)
    x, kernel, _ = abstract(2048, 32, channels, out, phases=from_phases)
    run = functools.partial(nn.conv3x3, from_phases=from_phases, to_phases=not from_phases)

    def both_ways(x, kernel, gradient):
        y, pull = jax.vjp(run, x, kernel)
        return y, *pull(gradient)

    text = lower_for_cuda(both_ways, x, kernel, jax.eval_shape(run, x, kernel))
    assert text.count("@mosaic_gpu") == 2 and text.count("xla.gpu.triton") == 1
    assert "stablehlo.convolution" not in text


@needs_eleven
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("frames", "has", "maker"), [(2048, True, "mosaic_gpu"), (2048, False, "triton"), (16, True, "triton")]
)
def test_the_front_takes_it_for_many_images_where_there_is_mosaic(frames, has, maker, monkeypatch):
    monkeypatch.setattr(gpu_convolution, "HAS_MOSAIC", has)
    text = lower_for_cuda(lambda *arrays: gpu_convolution.conv3x3(*arrays), *abstract(frames, 32, 64, 32))
    assert {name for name in ("mosaic_gpu", "triton") if name in text} == {maker}


@pytest.mark.parametrize(
    ("shape", "out", "expected"),
    [
        ((8192, 32, 32, 64), 32, Cut(rows=4)),
        ((2048, 32, 32, 16), 64, None),  # Triton is faster
        ((2048, 16, 16, 128), 48, Cut(rows=2, stages=3, behind=2)),
        ((2000, 32, 32, 64), 32, None),  # not full groups of images
        ((512, 32, 32, 64), 32, None),  # 64 programs
        ((2048, 30, 32, 64), 32, None),
        ((2048, 32, 32, 64), 48, None),  # not measured
        ((8192, 8, 8, 192), 64, None),  # its weights do not fit into shared memory
    ],
    ids=str,
)
def test_where_it_is_used(shape, out, expected):
    assert cut_for(jax.ShapeDtypeStruct(shape, jnp.bfloat16), out) == expected
    assert cut_for(jax.ShapeDtypeStruct(shape, jnp.float32), out) is None


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((64, 4, 4, 48, 32), Cut()),
        ((64, 6, 4, 64, 32), Cut(rows=4)),
        ((64, 4, 4, 64, 40), Cut()),
        ((65, 4, 4, 64, 32), Cut()),
        ((64, 4, 5, 64, 32), Cut()),
    ],
    ids=str,
)
def test_other_sizes_are_refused(shape, cut):
    with pytest.raises(ValueError, match="sizes"):
        jax.eval_shape(lambda: conv3x3(*operands(*shape), silu=True, to_phases=True, cut=cut))
