"""What every implementation of `ssd` is held to: cases, the float64 oracle, and the comparison.

On a GPU the kernels run as they are; without one, interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.ssd import ssd
from drama_jax.ssd.chunked import ssd_chunked
from drama_jax.ssd.reference import ssd_reference

ON_GPU = jax.default_backend() == "gpu"
# Of the largest value of each array. The products of bfloat16 operands round scores, decays and states to 8 bits.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 1.5e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `ssd`: sizes, decays, and where rows are reset."""

    name: str
    shape: tuple[int, int, int, int, int, int]  # B, T, H, P, G, N
    decay: tuple[float, float] = (1e-3, 1.6)  # smallest and largest -dt A of a step
    resets: tuple[tuple[int, ...], ...] | None = ((),)  # steps, row by row in turns; None: no segment ids
    skip: bool = True  # D
    state: bool = True  # initial state


CASES = (
    Case("one_step", (2, 1, 2, 16, 1, 16)),
    # At the first step, inside a chunk, at the edges of chunks of 16 and 32, twice in a row, at the last step.
    Case("resets", (2, 41, 4, 24, 2, 20), resets=((0, 5, 16, 33), (15, 16, 17, 32, 40))),
    Case("every_step", (1, 20, 2, 16, 1, 16), resets=(tuple(range(20)),)),
    Case("bare", (1, 37, 2, 16, 1, 16), resets=None, skip=False, state=False),
    Case("strong_decay", (1, 70, 2, 16, 1, 16), decay=(0.01, 20.0), resets=((9, 50),)),
    Case("weak_decay", (1, 70, 2, 16, 1, 16), decay=(1e-6, 2e-6)),
    Case("strips", (1, 150, 1, 16, 1, 16), resets=((70, 96),)),
    Case("largest", (1, 33, 1, 128, 1, 256)),
)
# The shapes of the benchmark. Too large for a CPU.
REALISTIC = (
    Case("drama_train", (16, 128, 16, 64, 1, 16), resets=((0, 40, 64), (100,), ())),
    Case("drama_1k", (16, 1024, 16, 64, 1, 16), resets=((512, 700), ())),
    Case("drama_8k", (4, 8192, 16, 64, 1, 16), resets=((5000,), ())),
    Case("lm_2k", (8, 2048, 24, 64, 1, 128), decay=(1e-3, 0.2)),
    Case("lm_8k", (2, 8192, 24, 64, 1, 128), decay=(1e-3, 0.2)),
)


def case(name: str) -> Case:
    return next(c for c in CASES + REALISTIC if c.name == name)


def numbers(case: Case, dtype: Any, seed: int = 0) -> tuple[dict[str, jax.Array], jax.Array | None, Any]:
    """Operands, segment ids and the weights of outputs in the loss; x, B, C in dtype, the rest in at least float32."""
    batch, time, heads, head_dim, groups, state_dim = case.shape
    rng = np.random.default_rng(seed)
    wide = np.float64 if dtype == jnp.float64 else np.float32
    low, high = case.decay
    A = -rng.uniform(0.5, 1.0, heads)
    dt = np.exp(rng.uniform(np.log(low), np.log(high), (batch, time, heads))) / -A.max()
    inputs: dict[str, Any] = {
        "x": rng.normal(size=(batch, time, heads, head_dim)).astype(wide).astype(dtype),
        "dt": dt.astype(wide),
        "A": A.astype(wide),
        "B": rng.normal(size=(batch, time, groups, state_dim)).astype(wide).astype(dtype),
        "C": rng.normal(size=(batch, time, groups, state_dim)).astype(wide).astype(dtype),
    }
    if case.skip:
        inputs["D"] = rng.normal(size=heads).astype(wide)
    if case.state:
        inputs["initial_state"] = rng.normal(size=(batch, heads, head_dim, state_dim)).astype(wide)
    ids = None
    if case.resets is not None:
        starts = np.zeros((batch, time), np.int32)
        for row in range(batch):
            starts[row, list(case.resets[row % len(case.resets)])] = 1
        ids = jnp.asarray(np.cumsum(starts, 1, dtype=np.int32))
    w = rng.normal(size=(batch, time, heads, head_dim)).astype(wide).astype(dtype)
    w2 = rng.normal(size=(batch, heads, head_dim, state_dim)).astype(wide)
    return {name: jnp.asarray(value) for name, value in inputs.items()}, ids, (jnp.asarray(w), jnp.asarray(w2))


def implementation(name: str, **options: Any) -> Any:
    """`ssd` by one implementation, as it can run here."""
    if name == "pallas":
        options["interpret"] = not ON_GPU
    return functools.partial(ssd, implementation=name, **options)


def results(function: Any, inputs: dict[str, jax.Array], ids: jax.Array | None, weights: Any) -> dict[str, Any]:
    """y, final state, and the gradients of their weighted sum by every operand."""

    def loss(inputs: dict[str, jax.Array], weights: Any) -> Any:
        y, final = function(**inputs, segment_ids=ids)
        sums = [jnp.sum(a.astype(final.dtype) * b.astype(final.dtype)) for a, b in zip((y, final), weights)]
        return sums[0] + sums[1], (y, final)

    gradients, (y, final) = jax.jit(jax.grad(loss, has_aux=True))(inputs, weights)
    return {"y": y, "final": final} | {f"grad_{name}": value for name, value in gradients.items()}


def oracle(
    inputs: dict[str, jax.Array], ids: jax.Array | None, weights: Any, exact: Any = None
) -> dict[str, np.ndarray]:
    """The same in float64, by `exact` or the token scan; large cases by chunks, which the tests hold to the scan."""
    wide = {name: value.astype(jnp.float64) for name, value in inputs.items()}
    weights = tuple(value.astype(jnp.float64) for value in weights)
    function = exact or (ssd_reference if inputs["x"].size < 10**6 else ssd_chunked)
    return {name: np.asarray(value) for name, value in results(function, wide, ids, weights).items()}


def errors(actual: dict[str, Any], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each array, over its largest value."""
    assert actual.keys() == expected.keys()
    found = {}
    for name, value in expected.items():
        difference = np.abs(np.asarray(actual[name].astype(jnp.float64)) - value).max()
        found[name] = float(difference / max(np.abs(value).max(), 1e-30))
    return found
