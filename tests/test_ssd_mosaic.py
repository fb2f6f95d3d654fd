"""The Mosaic GPU kernel of `benchmarks.ssd_mosaic`: its results when interpreted, its lowering, and rows that fail."""

import json
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import processes, ssd_mosaic
from benchmarks import ssd as bench
from benchmarks.ssd_mosaic import VARIANTS, Variant
from drama_jax.ssd import ssd
from tests.tools import lower_for_cuda

ELEVEN = jax.__version_info__ >= (0, 11)
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="before jax 0.11 only jax._src has the GPU interpreter"
)


def numbers(shape):
    inputs = bench.operands(shape, jnp.bfloat16)
    return {name: value for name, value in inputs.items() if name != "D"}


# The interpreter takes no operand of a product from registers. The first walks through more chunks than it has stages.
@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "variant"),
    [
        ((1, 192, 1, 64, 16), Variant(registers=False)),
        ((1, 128, 8, 64, 32), Variant(registers=False, sums="inside", warpgroups=2, stages=1)),
    ],
    ids=["sums_by_xla", "two_warpgroups_sums_inside"],
)
def test_the_kernel_equals_chunked(shape, variant):
    inputs = jax.jit(numbers, static_argnums=0)(shape)
    found = ssd_mosaic.scan(**inputs, variant=variant, interpret=plgpu.InterpretGPUParams(detect_races=True))
    wide = {name: value.astype(jnp.float32) for name, value in inputs.items()}
    reference = jax.jit(ssd, static_argnames="implementation")(**wide, implementation="chunked")
    for actual, expected in zip(found, reference):
        actual, expected = np.asarray(actual.astype(jnp.float32)), np.asarray(expected)
        # Operands of products are rounded to 8 bits.
        assert np.abs(actual - expected).max() < 2**-7 * np.abs(expected).max()


@pytest.mark.skipif(not ELEVEN, reason="before jax 0.11 Mosaic GPU does not lower without the GPU's jaxlib")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 128, 16, 64, 16), (1, 128, 24, 64, 128)])
def test_every_variant_lowers_for_a_gpu(name, shape):
    inputs = jax.eval_shape(lambda: numbers(shape))
    text = lower_for_cuda(lambda inputs: ssd_mosaic.scan(**inputs, variant=VARIANTS[name]), inputs)
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize("shape", [(1, 100, 2, 64, 16), (1, 64, 2, 32, 16), (1, 64, 2, 64, 24)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="sizes"):
        jax.eval_shape(lambda: ssd_mosaic.scan(**numbers(shape)))


def test_a_row_that_fails_costs_no_other(monkeypatch):
    def run(command, *, timeout, **_):
        name = command[command.index("--row") + 2]
        if name == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        if name == "breaks":
            return types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nValueError: too large")
        return types.SimpleNamespace(returncode=0, stdout="a line\n" + json.dumps({"forward_ms": 1.0}), stderr="")

    monkeypatch.setattr(processes.subprocess, "run", run)
    hung, broken, good = processes.rows("ssd_mosaic", ["lm_2k"], ["hangs", "breaks", "works"], False)
    assert "no result" in hung["error"]
    assert "too large" in broken["error"]
    assert good["forward_ms"] == 1.0
