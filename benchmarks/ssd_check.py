"""The contract of tests/ssd on the device at hand, and the errors of the SSD scan against float64.

Run through `python -m benchmarks.ssd --check` and `--accuracy`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from drama_jax.ssd import fused
from drama_jax.ssd.tiles import Apart, padded

# Smallest and largest -dt A of a step.
DECAYS = {"1e-6": (1e-6, 2e-6), "0.001 to 1.6": (1e-3, 1.6), "1e-6 to 20": (1e-6, 20.0)}
LENGTHS = (64, 1024, 16384, 65536)
INTERPRETED = 1024
"""The longest sequence that the interpreter of the kernels is given."""


def _contract() -> Any:
    """tests/ssd/contract.py, which only a checkout has."""
    return importlib.import_module("tests.ssd.contract")


def apart(x: jax.Array, B: jax.Array, **operands: Any) -> tuple[jax.Array, jax.Array]:
    """The kernels with the backward pass of `gpu_backward_apart`, also where it is not the default."""
    tiles = dataclasses.replace(fused.default_tiles(x, B), apart=Apart(depth=min(64, padded(B.shape[-1]))))
    return fused.ssd_pallas(x=x, B=B, tiles=tiles, **operands)


def check(
    directory: pathlib.Path | None = None,
    names: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> int:
    """Every case, implementation and dtype against float64; writes the log case by case, returns how many failed.

    Args:
      directory: of the log; None for benchmarks/results.
      names: of the cases; None for all. With names the kernels are also checked with the backward pass `apart`.
      dtypes: of the operands; of one alone the log's name has it.
    """
    contract = _contract()
    cases = contract.CASES + (contract.REALISTIC if contract.ON_GPU else ())
    functions = {name: contract.implementation(name) for name in ("chunked", "pallas")}
    if names is not None:
        cases = [case for case in cases if case.name in names]
        functions["apart"] = functools.partial(apart, interpret=not contract.ON_GPU)
    if not cases:
        raise SystemExit(f"{' '.join(names or ())}: checked on a GPU only; without --cases the small cases are checked")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    part = "".join(f"_{name}" for name in [*(names or ()), *(dtypes if len(dtypes) == 1 else ())])
    out = (directory or common.RESULTS) / f"ssd_check{part}-{common.device_name().lower().replace(' ', '-')}.log"
    out.parent.mkdir(parents=True, exist_ok=True)
    head = f"ssd contract, {common.device_name()}, jax {jax.__version__}, commit {common.commit()}"
    out.write_text(head + ("" if contract.ON_GPU else ", kernels interpreted") + "\n")
    failed = 0

    def say(line: str) -> None:  # at once: a time limit must not cost the cases before it
        print(line, flush=True)
        with out.open("a") as log:
            log.write(line + "\n")

    for case in cases:
        for dtype in dtypes:
            inputs, ids, weights = contract.numbers(case, jnp.dtype(dtype))
            expected = contract.oracle(inputs, ids, weights)
            for implementation, function in functions.items():
                errors = contract.errors(contract.results(function, inputs, ids, weights), expected)
                # A NaN is not below the tolerance either.
                passed = all(error <= contract.TOLERANCE[dtype] for error in errors.values())
                failed += not passed
                parts = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
                say(f"{'PASS' if passed else 'FAIL'} {implementation} {case.name} {dtype}: {parts}")
    say(f"{failed} failed; largest error over the largest value of each array, at most {contract.TOLERANCE}")
    print(out)
    return failed


def accuracy_rows() -> Iterator[dict[str, Any]]:
    """Errors of y, the final state, the gradient of dt and the worst gradient, over T and decays."""
    contract = _contract()
    jax.config.update("jax_enable_x64", True)
    oracle = functools.partial(contract.oracle, exact=contract.implementation("chunked"))
    for dtype in ("float32", "bfloat16"):
        for label, decay in DECAYS.items():
            for time in LENGTHS:
                case = contract.Case("accuracy", (1, time, 2, 16, 1, 16), decay=decay, resets=((time // 3,),))
                inputs, ids, weights = contract.numbers(case, jnp.dtype(dtype))
                expected = oracle(inputs, ids, weights)
                for implementation in ("chunked", "pallas"):
                    if implementation == "pallas" and not contract.ON_GPU and time > INTERPRETED:
                        continue
                    function = contract.implementation(implementation)
                    errors = contract.errors(contract.results(function, inputs, ids, weights), expected)
                    gradients = [error for name, error in errors.items() if name.startswith("grad_")]
                    yield {
                        "name": "accuracy",
                        "implementation": implementation,
                        "dtype": dtype,
                        "decay": label,
                        "T": time,
                        "y": errors["y"],
                        "final": errors["final"],
                        "grad_dt": errors["grad_dt"],
                        "worst_gradient": max(gradients),
                    }
