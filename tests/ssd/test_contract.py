"""Every implementation of `ssd` against the float64 oracle: values, final states and all gradients."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd import contract

pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
SMALL = [("pallas", c.name, "float32") for c in contract.CASES]
SMALL += [("chunked", c, "float32") for c in ("resets", "strong_decay", "weak_decay", "strips")]
SMALL += [("chunked", "resets", "bfloat16"), ("pallas", "resets", "bfloat16"), ("pallas", "strips", "bfloat16")]
SMALL += [("chunked", "resets", "float64")]
SMALL += [("pallas", "strips", "float64") for _ in range(not contract.ON_GPU)]
SMALL += [("reference", "resets", "float32")]
if contract.ON_GPU:
    SMALL += [("pallas", c.name, "bfloat16") for c in contract.CASES if c.name not in ("resets", "strips")]
LARGE = [
    (name, c.name, dtype)
    for c in contract.REALISTIC
    for name in ("chunked", "pallas")
    for dtype in ("float32", "bfloat16")
]


@functools.cache
def expected(case, dtype):
    return contract.oracle(*contract.numbers(contract.case(case), jnp.dtype(dtype)))


def check(implementation, case, dtype):
    inputs, ids, weights = contract.numbers(contract.case(case), jnp.dtype(dtype))
    function = contract.implementation(implementation)
    actual = contract.results(function, inputs, ids, weights)
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert actual["y"].dtype == dtype and actual["final"].dtype == wide
    for name, value in inputs.items():
        assert actual[f"grad_{name}"].dtype == value.dtype
    found = contract.errors(actual, expected(case, dtype))
    print(f"{implementation} {case} {dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    assert all(np.isfinite(np.asarray(value.astype(jnp.float32))).all() for value in actual.values())
    assert max(found.values()) <= contract.TOLERANCE[dtype]


@pytest.mark.parametrize(("implementation", "case", "dtype"), SMALL)
def test_values_states_and_gradients(implementation, case, dtype, x64):
    check(implementation, case, dtype)


@pytest.mark.skipif(not contract.ON_GPU, reason="too large for a CPU")
@pytest.mark.parametrize(("implementation", "case", "dtype"), LARGE)
def test_realistic_shapes(implementation, case, dtype, x64):
    check(implementation, case, dtype)
