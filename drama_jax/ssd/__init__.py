"""The state-space-duality (SSD) scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), with per-step resets.

One recurrence, several implementations behind one function. Per head h, with a state s [P, N]:

    s_t = exp(dt_t A) s_(t-1) + dt_t x_t (outer) B_t
    y_t = s_t . C_t + D x_t

In shapes, B batch, T time, H heads, P head dim, N state dim, G groups (head h reads group h // (H / G) of B and C).

* "reference": a scan over tokens, the oracle of the others.
* "chunked": matrix products inside chunks, an associative scan over the chunks' states; any device, any float dtype.
* "pallas": the same as GPU kernels (`ssd.fused`; Triton lowering, which JAX deprecates since 0.11).

Resets compare segment indices: in the pairs of steps inside a chunk, in what reaches a chunk's end, in what its start
hands on. No decay stands for a reset.

Memory is linear in T. "chunked" and "pallas" keep the operands and chunk states for the backward pass and compute what
is inside the chunks again: in float32, B = 2, H = 4, P = 64, N = 16, at T = 1,024 and 8,192, operands of 2.4 and 19 MB,
kept 5.9 and 49 MB by "chunked", 4.5 and 36 MB by "pallas". While "chunked" runs backward on a CPU it holds all chunks
at once, 30 MB at T = 1,024 and 119 at 4,096.

Errors against float64, largest over the largest value of each array: the worst of y, the final state and all
gradients, `python -m benchmarks.ssd --accuracy` on a CPU (kernels interpreted, T up to 1,024 for those):

    -dt A of a step     dtype       T = 64   1,024    16,384   65,536
    1e-6                float32     4e-7     5e-7     5e-7     2e-6
    0.001 to 1.6        float32     2e-7     5e-7     4e-7     3e-7
    1e-6 to 20          float32     2e-7     5e-7     4e-7     4e-7
    1e-6                bfloat16    4e-3     4e-3     5e-3     5e-3
    0.001 to 1.6        bfloat16    4e-3     5e-3     7e-3     5e-3
    1e-6 to 20          bfloat16    4e-3     4e-3     5e-3     5e-3

bfloat16 is that of x, B and C: operands of products are rounded to it; decays, states and sums are float32.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from drama_jax import checks
from drama_jax.config import ConfigError
from drama_jax.ssd import fused
from drama_jax.ssd.chunked import ssd_chunked
from drama_jax.ssd.fused import ssd_pallas
from drama_jax.ssd.reference import ssd_reference
from drama_jax.ssd.reference import ssd_step as _step
from drama_jax.ssd.segments import segment_index
from drama_jax.ssd.selective import selective_scan, selective_step

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "default_implementation",
    "segment_index",
    "selective_scan",
    "selective_step",
    "ssd",
    "ssd_step",
]

FASTER = {"bfloat16": (65_536, 128), "float32": (1_024, 16)}
"""dtype of x -> the largest T and the largest N for which the kernels were measured to be faster than "chunked",
forward and backward: on an H100, with N = 16 from T = 128 on, with N = 128 from T = 2,048 on (benchmarks/README.md, SSD
scan). In float32, without the matrix units, N = 16 alone is, and only while T is short."""
Implementation = Literal["reference", "chunked", "pallas"]
IMPLEMENTATIONS = {"reference": ssd_reference, "chunked": ssd_chunked, "pallas": ssd_pallas}


def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the SSD recurrence over a sequence (Dao & Gu 2024, eq. 1 and section 6).

    State, decays and sums are held in float32 for bfloat16 and float32 inputs and in float64 for float64 inputs;
    matrix products take operands of x's dtype (float32 products are exact float32, never TF32).

    Args:
      x: `[B, T, H, P]` float, the input; any T >= 1.
      dt: `[B, T, H]` float, positive step sizes (after bias and softplus).
      A: `[H]` float, negative decay rates.
      B: `[B, T, G, N]`, x's dtype, input projection.
      C: `[B, T, G, N]`, x's dtype, output projection.
      D: optional `[H]` float, skip connection.
      initial_state: optional `[B, H, P, N]` float, the state before the first step; zeros if absent.
      segment_ids: optional `[B, T]` int. The state is dropped where the id changes; `initial_state` belongs to
        segment 0, so that `cumsum(is_first)` drops it when the sequence begins with an episode's first step.
      chunk_size: steps per chunk of the chunked implementation; no effect on the result but rounding.
      implementation: "reference" (token by token), "chunked" (matrix products inside chunks), "pallas" (GPU kernels,
        P up to 128 and N up to 256), or None for what `default_implementation` picks.
      interpret: with "pallas", run the kernels without a GPU, slowly, for tests.

    Returns:
      y `[B, T, H, P]` in x's dtype, and the state after the last step, `[B, H, P, N]` in float32 or float64.

    Raises:
      TypeError, ValueError: on arguments that are no arrays, or shapes or dtypes that do not fit.
      ConfigError: on an implementation that is unknown or cannot run here.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"ssd: unknown implementation {implementation!r}; accepted: None, {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    checks.arrays("ssd", x=(x, ("B", "T", "H", "P"), "float"))
    checks.arrays(
        "ssd",
        dict(zip("BTHP", x.shape)),
        dt=(dt, ("B", "T", "H"), "float"),
        A=(A, ("H",), "float"),
        B=(B, ("B", "T", "G", "N"), str(x.dtype)),
        C=(C, ("B", "T", "G", "N"), str(x.dtype)),
        D=(D, ("H",), "float or None"),
        initial_state=(initial_state, ("B", "H", "P", "N"), "float or None"),
        segment_ids=(segment_ids, ("B", "T"), "integer or None"),
    )
    checks.integers("ssd", T=x.shape[1], chunk_size=chunk_size)
    _check_groups("ssd", x.shape[2], B.shape[2])
    name = implementation or default_implementation(x, B)
    extra: dict[str, Any] = {}
    if name == "chunked":
        extra["chunk_size"] = chunk_size
    if name == "pallas":
        reason = fused.why_not(x, B, interpret=interpret)
        if reason:
            raise ConfigError(f"ssd: implementation 'pallas' cannot run: {reason}; use None, 'chunked' or 'reference'")
        extra["interpret"] = interpret
    return IMPLEMENTATIONS[name](x, dt, A, B, C, D=D, initial_state=initial_state, segment_ids=segment_ids, **extra)


def default_implementation(x: jax.Array, B: jax.Array) -> Implementation:
    """The implementation of `ssd` for x [B, T, H, P] and B [B, T, G, N]: the one place where it is chosen.

    The kernels where they run and `FASTER` says that they were measured to be faster; "chunked" everywhere else.
    """
    time, state = FASTER.get(str(x.dtype), (0, 0))
    measured = x.shape[1] <= time and B.shape[3] <= state
    return "pallas" if measured and fused.why_not(x, B, interpret=False) is None else "chunked"


def ssd_step(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the SSD recurrence.

    The arithmetic runs in at least float32; the state keeps its own dtype, so that a caller may hold it in bfloat16.

    Args:
      state: `[B, H, P, N]` float.
      x: `[B, H, P]` float.
      dt: `[B, H]` float, positive.
      A: `[H]` float, negative.
      B: `[B, G, N]`, x's dtype.
      C: `[B, G, N]`, x's dtype.
      D: optional `[H]` float.

    Returns:
      y `[B, H, P]` in x's dtype and the new state `[B, H, P, N]` in the state's dtype.

    Raises:
      TypeError, ValueError: on arguments that are no arrays, shapes or dtypes that do not fit.
    """
    checks.arrays("ssd_step", x=(x, ("B", "H", "P"), "float"))
    checks.arrays(
        "ssd_step",
        dict(zip("BHP", x.shape)),
        state=(state, ("B", "H", "P", "N"), "float"),
        dt=(dt, ("B", "H"), "float"),
        A=(A, ("H",), "float"),
        B=(B, ("B", "G", "N"), str(x.dtype)),
        C=(C, ("B", "G", "N"), str(x.dtype)),
        D=(D, ("H",), "float or None"),
    )
    _check_groups("ssd_step", x.shape[1], B.shape[1])
    return _step(state, x, dt, A, B, C, D=D)


def _check_groups(function: str, heads: int, groups: int) -> None:
    if groups < 1 or heads % groups:
        raise ValueError(
            f"{function}: the number of groups of B and C must divide the number of heads, got G={groups} and H={heads}"
        )
