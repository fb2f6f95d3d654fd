"""The backward kernel of the SSD scan: gradients of every operand from the states that enter the chunks.

`gradients` walks through a strip's chunks from the end, holds the gradient of the state in registers, and computes
again what is inside a chunk. The equations are in `chunk_gradients`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from drama_jax.ssd import pallas
from drama_jax.ssd.chunk_gradients import Chunk, Inside, Through, by_dt, by_log_decays, by_x
from drama_jax.ssd.decays import scaled
from drama_jax.ssd.gpu_forward import Dot
from drama_jax.ssd.places import Pieces, Place
from drama_jax.ssd.tiles import Ends, Inputs, Plan, Tiles

Carry = tuple[Pieces, jax.Array, jax.Array]
"""ds, and the sums dA and dD so far."""


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def gradients(
    inputs: Inputs, saved: jax.Array, dy: jax.Array, ends: Ends, tiles: Tiles, *, interpret: bool
) -> dict[str, jax.Array]:
    """Gradients of all operands.

    Args:
      inputs: the operands of the scan.
      saved: `[B, H, chunks, P, N]` as dt, the state that enters each chunk.
      dy: the gradient of y, `[B, T, H, P]` as x.
      ends: the gradient of the final state, and what the strips add to it, from `strip_states`.
      tiles: how to cut; the chunk is that of `outputs`.
      interpret: run without a GPU.

    Returns:
      "x" as x; "dt", "B", "C", "A", "D" as the operands, and "initial_state" `[B, H, P, N]`.
    """
    plan = Plan.of(inputs, tiles)
    done = pallas.call(
        functools.partial(_strip, plan, functools.partial(pallas.dot, interpret=interpret)),
        {"inputs": inputs, "saved": saved, "dy": dy, "ends": ends},
        _out_shapes(plan, inputs),
        name="ssd_gradients",
        programs=plan.programs,
        warps=tiles.backward_warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return _together(plan, done, inputs.B.dtype)


def _out_shapes(plan: Plan, inputs: Inputs) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes: sums over what several programs share are left to XLA."""
    split = (plan.blocks, plan.batch, plan.time, plan.heads)
    sums = (plan.batch, plan.tiles.strips, plan.blocks, plan.heads)
    shapes = {"dt": split, "A": sums, "D": sums, "B": (*split, plan.state_dim), "C": (*split, plan.state_dim)}
    shapes["initial_state"] = (plan.batch, plan.heads, plan.head_dim, plan.state_dim)
    out_shapes = {name: jax.ShapeDtypeStruct(shape, inputs.steps.dt.dtype) for name, shape in shapes.items()}
    return out_shapes | {"x": jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype)}


def _together(plan: Plan, done: dict[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    """Adds up the blocks of P, the heads of a group, and the programs' parts of dA and dD."""

    def of_group(name: str) -> jax.Array:
        heads = plan.heads // plan.groups
        parts = done[name].reshape(plan.blocks, plan.batch, plan.time, plan.groups, heads, plan.state_dim)
        return parts.sum(axis=(0, 4)).astype(dtype)

    return done | {
        "dt": done["dt"].sum(axis=0),
        "A": done["A"].sum(axis=(0, 1, 2)),
        "D": done["D"].sum(axis=(0, 1, 2)),
        "B": of_group("B"),
        "C": of_group("C"),
    }


def _strip(plan: Plan, dot: Dot, read: Any, write: Any) -> None:
    """One program: a head's columns of one strip."""
    place = Place.of_program(plan)
    zero = jnp.zeros((), read["inputs"].steps.dt.dtype)

    def step(k: jax.Array, carry: Carry) -> Carry:
        return _chunk(place, read, write, carry, plan.walk - 1 - k, dot)

    ds = place.start_of_walk(read["ends"], zero.dtype, reverse=True)
    ds, dA, dD = jax.lax.fori_loop(0, plan.walk, step, (ds, zero, zero))
    for at, piece in zip(place.state(0, 1), ds):
        pallas.store(write["initial_state"], *at, piece, place.strip == 0)
    write["A"][pallas.program_id()] = dA
    write["D"][pallas.program_id()] = dD


def _chunk(place: Place, read: Any, write: Any, carry: Carry, k: jax.Array, dot: Dot) -> Carry:
    """Writes the gradients of chunk k; ds at its start, and dA and dD with its part."""
    ds, dA, dD = carry
    chunk = Chunk.of(place, read["inputs"], read["dy"], k)
    scores, reach = _scores_and_reach(chunk, read["inputs"], ds, dot)
    between = chunk.decays.between(transposed=True)
    scores = scores * between
    pallas.store(write["x"], *chunk.at_p, by_x(chunk, scores, reach, dot))
    dscores = dot(chunk.x, chunk.dy.T)
    if chunk.D is not None:
        dD = dD + jnp.sum(chunk.diagonal(dscores))
    inside = Inside.of(chunk, scores * dscores, dot)
    inner = (dscores * between * chunk.dt[:, None]).astype(chunk.x.dtype)
    ds, through = _through_states(place, chunk, read, write, ds, inner, k, dot)
    da = by_log_decays(chunk, inside, through)
    pallas.store(write["dt"], place.scalars(chunk.time), chunk.valid, by_dt(chunk, inside, through, da))
    return ds, dA + jnp.sum(chunk.dt * da), dD


def _scores_and_reach(chunk: Chunk, inputs: Any, ds: Pieces, dot: Dot) -> tuple[jax.Array, jax.Array]:
    """B_j . C_i [j, i], before decay, and ds B_j [Q, width]."""
    steps, width = chunk.x.shape
    scores, reach = jnp.zeros((steps, steps), chunk.dt.dtype), jnp.zeros((steps, width), chunk.dt.dtype)
    for piece, at in zip(ds, chunk.at_n):
        b = pallas.load(inputs.B, *at)
        scores = scores + dot(b, pallas.load(inputs.C, *at).T)
        reach = reach + dot(b, piece.astype(chunk.x.dtype).T)
    return scores, reach


def _through_states(
    place: Place, chunk: Chunk, read: Any, write: Any, ds: Pieces, inner: jax.Array, k: jax.Array, dot: Dot
) -> tuple[Pieces, Through]:
    """Writes dB and dC; ds at the chunk's start. One piece of N after the other: all would not fit the registers."""
    low, wide = chunk.x.dtype, chunk.dt.dtype
    weighted = scaled(chunk.dy, chunk.from_start).T
    exit_j, entry_i, whole = jnp.zeros_like(chunk.dt), jnp.zeros_like(chunk.dt), jnp.zeros((), wide)
    at_saved = place.state(place.strip * place.plan.walk + k, place.plan.chunks)
    before = []
    for piece, at, at_b, at_s in zip(ds, chunk.at_n, place.partial(chunk.time, chunk.valid), at_saved):
        # Read again, from the cache, for the same reason.
        b, c = pallas.load(read["inputs"].B, *at), pallas.load(read["inputs"].C, *at)
        s = pallas.load(read["saved"], *at_s)
        whole = whole + jnp.sum(s * piece)
        by_entry = chunk.from_start[:, None] * dot(chunk.dy, s.astype(low))
        entry_i = entry_i + jnp.sum(by_entry * c.astype(wide), axis=1)
        pallas.store(write["C"], *at_b, by_entry + dot(inner.T, b))
        by_exit = chunk.to_end[:, None] * dot(chunk.x, piece.astype(low))
        exit_j = exit_j + jnp.sum(by_exit * b.astype(wide), axis=1)
        pallas.store(write["B"], *at_b, chunk.dt[:, None] * by_exit + dot(inner, c))
        before.append(chunk.whole * piece + dot(weighted, c))
    return tuple(before), Through(exit_j, entry_i, whole)
