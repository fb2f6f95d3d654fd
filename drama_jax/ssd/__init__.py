"""The state-space-duality (SSD) scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), with per-step resets.

One recurrence, several implementations behind one function. Per head h, with a state s [P, N]:

    s_t = exp(dt_t A) s_(t-1) + dt_t x_t (outer) B_t
    y_t = s_t . C_t + D x_t

In shapes, B batch, T time, H heads, P head dim, N state dim, G groups (head h reads group h // (H / G) of B and C).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from drama_jax.ssd.chunked import ssd_chunked
from drama_jax.ssd.reference import ssd_reference
from drama_jax.ssd.reference import ssd_step as _step
from drama_jax.ssd.segments import segment_index

__all__ = ["IMPLEMENTATIONS", "Implementation", "segment_index", "ssd", "ssd_step"]

Implementation = Literal["reference", "chunked", "pallas"]
IMPLEMENTATIONS = {"reference": ssd_reference, "chunked": ssd_chunked}


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
      implementation: "reference" (token by token), "chunked" (matrix products inside chunks), "pallas" (not yet
        available), or None for the fastest measured one, "chunked".

    Returns:
      y `[B, T, H, P]` in x's dtype, and the state after the last step, `[B, H, P, N]` in float32 or float64.

    Raises:
      ValueError: on shapes or dtypes that do not fit, or an implementation that cannot run.
    """
    name = "chunked" if implementation is None else implementation
    if name == "pallas":
        raise ValueError(
            "ssd: implementation 'pallas' is not available yet: no Pallas kernel has been written; "
            "use implementation=None, 'chunked' or 'reference'"
        )
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"ssd: unknown implementation {name!r}; accepted: None, {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(f"ssd: x must be [B, T, H, P] and B [B, T, G, N], got {x.shape} and {B.shape}")
    batch, time, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    if time < 1 or chunk_size < 1:
        raise ValueError(f"ssd: needs at least one step and chunk_size >= 1, got T={time} and chunk_size={chunk_size}")
    _check_groups(heads, groups)
    _check_shape("dt", dt, (batch, time, heads))
    _check_shape("A", A, (heads,))
    _check_shape("B", B, (batch, time, groups, state_dim))
    _check_shape("C", C, (batch, time, groups, state_dim))
    _check_shape("D", D, (heads,))
    _check_shape("initial_state", initial_state, (batch, heads, head_dim, state_dim))
    _check_shape("segment_ids", segment_ids, (batch, time))
    _check_dtypes(x, dt, A, B, C, D, initial_state)
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"ssd: segment_ids must be integers, got {segment_ids.dtype}")
    extra = {"chunk_size": chunk_size} if name == "chunked" else {}
    return IMPLEMENTATIONS[name](x, dt, A, B, C, D=D, initial_state=initial_state, segment_ids=segment_ids, **extra)


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
      ValueError: on shapes or dtypes that do not fit.
    """
    if x.ndim != 3 or B.ndim != 3:
        raise ValueError(f"ssd_step: x must be [B, H, P] and B [B, G, N], got {x.shape} and {B.shape}")
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    _check_groups(heads, groups)
    _check_shape("state", state, (batch, heads, head_dim, state_dim))
    _check_shape("dt", dt, (batch, heads))
    _check_shape("A", A, (heads,))
    _check_shape("B", B, (batch, groups, state_dim))
    _check_shape("C", C, (batch, groups, state_dim))
    _check_shape("D", D, (heads,))
    _check_dtypes(x, dt, A, B, C, D, state)
    return _step(state, x, dt, A, B, C, D=D)


def _check_groups(heads: int, groups: int) -> None:
    if groups < 1 or heads % groups:
        raise ValueError(f"ssd: the number of groups must divide the number of heads, got G={groups} and H={heads}")


def _check_shape(name: str, value: jax.Array | None, shape: tuple[int, ...]) -> None:
    if value is not None and value.shape != shape:
        raise ValueError(f"ssd: {name} must have shape {shape} to fit x and B, got {value.shape}")


def _check_dtypes(
    x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, *others: jax.Array | None
) -> None:
    if not x.dtype == B.dtype == C.dtype:
        raise ValueError(f"ssd: x, B and C must share one dtype, got {x.dtype}, {B.dtype} and {C.dtype}")
    for value in (x, dt, A, *others):
        if value is not None and not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"ssd: all arrays but segment_ids must be floating point, got {value.dtype}")
