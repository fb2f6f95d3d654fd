"""The SSD scan through the GPU kernels of `gpu_forward` and `gpu_backward`, as one function with its gradient.

Kept between the passes: the operands and the state that enters each chunk, `[B, H, T / Q, P, N]`; everything inside a
chunk is computed again. Memory is linear in T.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from drama_jax.precision import at_least_float32
from drama_jax.ssd import gpu_backward, gpu_backward_apart, gpu_forward
from drama_jax.ssd.segments import segment_index
from drama_jax.ssd.tiles import Ends, Inputs, Plan, Steps, Tiles, default_tiles

LARGEST_HEAD_DIM, LARGEST_STATE_DIM = 128, 256
Saved = tuple[Inputs, jax.Array, tuple[()] | None]


def ssd_pallas(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence; arguments as in `drama_jax.ssd.ssd`, unchecked.

    Args:
      x: and the others, as there.
      tiles: how the work is cut; None for `default_tiles`.
      interpret: run the kernels without a GPU, slowly.
    """
    wide = at_least_float32(x.dtype)
    inputs = Inputs(
        x=x,
        B=B,
        C=C,
        D=None if D is None else D.astype(wide),
        steps=Steps(
            dt=dt.astype(wide),
            A=A.astype(wide),
            index=None if segment_ids is None else segment_index(segment_ids),
        ),
    )
    state = None if initial_state is None else initial_state.astype(wide)
    return _scan(inputs, state, tiles or default_tiles(x, B), interpret)


def why_not(x: jax.Array, B: jax.Array, *, interpret: bool) -> str | None:
    """Why the kernels cannot run on x [B, T, H, P] and B [B, T, G, N] here, or None if they can."""
    head_dim, state_dim = x.shape[-1], B.shape[-1]
    if head_dim > LARGEST_HEAD_DIM or state_dim > LARGEST_STATE_DIM:
        return (
            f"it takes P up to {LARGEST_HEAD_DIM} and N up to {LARGEST_STATE_DIM}, got P={head_dim} and N={state_dim}"
        )
    tiles = default_tiles(x, B)
    batch, time, heads, _ = x.shape
    chunks = -(-time // tiles.chunk) + max(tiles.strips, tiles.backward_strips)
    parts = -(-head_dim // tiles.width) * batch * time * heads * state_dim
    largest = max(x.size, parts, batch * heads * chunks * head_dim * state_dim)
    if largest >= 2**31:
        return f"its offsets are of 32 bits, and this size needs arrays of {largest:,} numbers; split the batch"
    if interpret:
        return None
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, got {x.dtype}"
    needed = "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if jax.default_backend() != "gpu":
        return f"{needed}, and JAX's default backend is {jax.default_backend()!r}"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "unknown"))
    major = capability.partition(".")[0]
    return None if major.isdecimal() and int(major) >= 8 else f"{needed}, and this one's is {capability}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(inputs: Inputs, state: jax.Array | None, tiles: Tiles, interpret: bool) -> tuple[jax.Array, jax.Array]:
    ends = _ends(inputs.x, inputs.B, state, inputs, tiles, reverse=False, interpret=interpret)
    y, final, _ = gpu_forward.outputs(inputs, ends, tiles, save=False, interpret=interpret)
    return y, final


def _scan_forward(
    inputs: Inputs, state: jax.Array | None, tiles: Tiles, interpret: bool
) -> tuple[tuple[jax.Array, jax.Array], Saved]:
    ends = _ends(inputs.x, inputs.B, state, inputs, tiles, reverse=False, interpret=interpret)
    y, final, saved = gpu_forward.outputs(inputs, ends, tiles, save=True, interpret=interpret)
    assert saved is not None
    # Neither has an array in it; which of the two it is says whether the state has a gradient.
    return (y, final), (inputs, saved, None if state is None else ())


def _scan_backward(
    tiles: Tiles, interpret: bool, kept: Saved, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array | None]:
    inputs, saved, state = kept
    dy, dfinal = cotangents
    tiles = dataclasses.replace(tiles, strips=tiles.backward_strips)
    saved = _resized(saved, Plan.of(inputs, tiles).chunks)
    ends = _ends(dy, inputs.C, dfinal, inputs, tiles, reverse=True, interpret=interpret)
    kernels = gpu_backward if tiles.apart is None else gpu_backward_apart
    out = kernels.gradients(inputs, saved, dy, ends, tiles, interpret=interpret)
    by_inputs = Inputs(
        x=out["x"],
        B=out["B"],
        C=out["C"],
        D=None if inputs.D is None else out["D"],
        steps=Steps(dt=out["dt"], A=out["A"], index=None),
    )
    return by_inputs, None if state is None else out["initial_state"]


def _resized(saved: jax.Array, chunks: int) -> jax.Array:
    """saved [B, H, chunks, P, N] for another number of chunks; those that come or go lie behind the end."""
    more = max(0, chunks - saved.shape[2])
    return jnp.pad(saved, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))[:, :, :chunks]


_scan.defvjp(_scan_forward, _scan_backward)


def _ends(
    values: jax.Array,
    keys: jax.Array,
    first: jax.Array | None,
    inputs: Inputs,
    tiles: Tiles,
    *,
    reverse: bool,
    interpret: bool,
) -> Ends:
    """What the walk through each strip starts from; arguments as of `gpu_forward.strip_states`."""
    if tiles.strips == 1:
        return Ends(first=first, sums=None, decays=None)
    sums, decays = gpu_forward.strip_states(values, keys, inputs, tiles, reverse=reverse, interpret=interpret)
    return Ends(first=first, sums=sums, decays=decays)
