"""The backward pass of the SSD scan in three kernels, of which two see to all chunks at the same time.

`gpu_backward` holds the state's gradient in registers beside everything else of a chunk, and writes dB and dC of every
head for XLA to add up. Here the state's gradients go through memory, as the states do, and dB and dC are added up where
they are computed:

* `ssd_state_gradients` walks from the end and writes the gradient of the state that leaves each chunk.
* `ssd_gradients_x`, one program for each chunk and head: dx, ddt, dA and dD.
* `ssd_gradients_keys`, one program for each chunk, group and piece of N, walks through the heads: dB and dC.

More work, as products of x and dy and the decays between steps are formed twice, for fewer registers and more programs.
The equations are in `chunk_gradients`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from drama_jax.ssd import pallas
from drama_jax.ssd.chunk_gradients import Chunk, Inside, Through, by_dt, by_log_decays, by_x
from drama_jax.ssd.gpu_forward import Dot, with_chunk
from drama_jax.ssd.places import Pieces, Place
from drama_jax.ssd.tiles import Apart, Ends, Inputs, Plan, Tiles


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def gradients(
    inputs: Inputs, saved: jax.Array, dy: jax.Array, ends: Ends, tiles: Tiles, *, interpret: bool
) -> dict[str, jax.Array]:
    """Gradients of all operands; arguments and results as of `gpu_backward.gradients`, `tiles.apart` must be there."""
    apart = tiles.apart
    assert apart is not None
    exits, initial = _state_gradients(inputs, dy, ends, tiles, interpret)
    # Every chunk is a strip from here on.
    tiles = dataclasses.replace(tiles, strips=exits.shape[2])
    read = {"inputs": inputs, "saved": saved, "exits": exits, "dy": dy}
    return (
        _by_x_and_dt(Plan.of(inputs, tiles), read, interpret)
        | _by_keys(Plan.of(inputs, dataclasses.replace(tiles, depth=apart.depth)), apart, read, interpret)
        | {"initial_state": initial}
    )


def _state_gradients(
    inputs: Inputs, dy: jax.Array, ends: Ends, tiles: Tiles, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the state that leaves each chunk `[B, H, chunks, P, N]`, and of the first `[B, H, P, N]`."""
    plan, wide = Plan.of(inputs, tiles), inputs.steps.dt.dtype
    dot = functools.partial(pallas.dot, interpret=interpret)

    def program(read: Any, write: Any) -> None:
        place = Place.of_program(plan)

        def step(k: jax.Array, ds: Pieces) -> Pieces:
            k = plan.walk - 1 - k
            for at, piece in zip(place.state(place.strip * plan.walk + k, plan.chunks), ds):
                pallas.store(write["exits"], *at, piece)
            return with_chunk(place, read, ds, k, dot, reverse=True)[0]

        ds = jax.lax.fori_loop(0, plan.walk, step, place.start_of_walk(read["ends"], wide, reverse=True))
        for at, piece in zip(place.state(0, 1), ds):
            pallas.store(write["initial_state"], *at, piece, place.strip == 0)

    sizes = (plan.head_dim, plan.state_dim)
    done = pallas.call(
        program,
        {"values": dy, "keys": inputs.C, "steps": inputs.steps, "ends": ends},
        {
            "exits": jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, *sizes), wide),
            "initial_state": jax.ShapeDtypeStruct((plan.batch, plan.heads, *sizes), wide),
        },
        name="ssd_state_gradients",
        programs=plan.programs,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return done["exits"], done["initial_state"]


def _by_x_and_dt(plan: Plan, read: Any, interpret: bool) -> dict[str, jax.Array]:
    """dx, ddt, dA and dD; a strip is a chunk."""
    x, wide = read["inputs"].x, read["inputs"].steps.dt.dtype
    sums = jax.ShapeDtypeStruct((plan.batch, plan.tiles.strips, plan.blocks, plan.heads), wide)
    done = pallas.call(
        functools.partial(_x_program, plan, functools.partial(pallas.dot, interpret=interpret)),
        read,
        {
            "x": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "dt": jax.ShapeDtypeStruct((plan.blocks, plan.batch, plan.time, plan.heads), wide),
            "A": sums,
            "D": sums,
        },
        name="ssd_gradients_x",
        programs=plan.programs,
        warps=plan.tiles.backward_warps,
        stages=plan.tiles.stages,
        interpret=interpret,
    )
    return done | {"dt": done["dt"].sum(axis=0)} | {name: done[name].sum(axis=(0, 1, 2)) for name in ("A", "D")}


def _x_program(plan: Plan, dot: Dot, read: Any, write: Any) -> None:
    """One head's columns of one chunk."""
    place = Place.of_program(plan)
    chunk = Chunk.of(place, read["inputs"], read["dy"], 0)
    entry_i, whole = _through_start(place, chunk, read, dot)
    scores, reach = _scores_and_reach(place, chunk, read, dot)
    exit_j = chunk.to_end * jnp.sum(chunk.x.astype(reach.dtype) * reach, axis=1)
    scores = scores * chunk.decays.between(transposed=True)
    pallas.store(write["x"], *chunk.at_p, by_x(chunk, scores, reach, dot))
    dscores = dot(chunk.x, chunk.dy.T)
    if chunk.D is not None:
        write["D"][pallas.program_id()] = jnp.sum(chunk.diagonal(dscores))
    inside = Inside.of(chunk, scores * dscores, dot)
    through = Through(exit_j, entry_i, whole)
    da = by_log_decays(chunk, inside, through)
    pallas.store(write["dt"], place.scalars(chunk.time), chunk.valid, by_dt(chunk, inside, through, da))
    write["A"][pallas.program_id()] = jnp.sum(chunk.dt * da)


def _through_start(place: Place, chunk: Chunk, read: Any, dot: Dot) -> tuple[jax.Array, jax.Array]:
    """entry_i [Q], and <s, ds>. One piece of N after the other, as below."""
    entered, whole = jnp.zeros(chunk.x.shape, chunk.dt.dtype), jnp.zeros((), chunk.dt.dtype)
    for at, at_s in zip(chunk.at_n, place.state(place.strip, place.plan.chunks)):
        c, s = pallas.load(read["inputs"].C, *at), pallas.load(read["saved"], *at_s)
        whole = whole + jnp.sum(s * pallas.load(read["exits"], *at_s))
        entered = entered + dot(c, s.astype(c.dtype).T)
    return chunk.from_start * jnp.sum(chunk.dy.astype(entered.dtype) * entered, axis=1), whole


def _scores_and_reach(place: Place, chunk: Chunk, read: Any, dot: Dot) -> tuple[jax.Array, jax.Array]:
    """B_j . C_i [j, i], before decay, and ds B_j [Q, width]."""
    (steps, width), wide = chunk.x.shape, chunk.dt.dtype
    scores, reach = jnp.zeros((steps, steps), wide), jnp.zeros((steps, width), wide)
    for at, at_s in zip(chunk.at_n, place.state(place.strip, place.plan.chunks)):
        b, ds = pallas.load(read["inputs"].B, *at), pallas.load(read["exits"], *at_s)
        scores = scores + dot(b, pallas.load(read["inputs"].C, *at).T)
        reach = reach + dot(b, ds.astype(b.dtype).T)
    return scores, reach


def _by_keys(plan: Plan, apart: Apart, read: Any, interpret: bool) -> dict[str, jax.Array]:
    """dB and dC; a strip is a chunk."""
    parts = math.gcd(apart.parts, plan.heads // plan.groups)
    out = jax.ShapeDtypeStruct(
        (parts, plan.batch, plan.time, plan.groups, plan.state_dim), read["inputs"].steps.dt.dtype
    )
    done = pallas.call(
        functools.partial(_keys_program, plan, parts, functools.partial(pallas.dot, interpret=interpret)),
        read,
        {"B": out, "C": out},
        name="ssd_gradients_keys",
        programs=plan.batch * plan.tiles.strips * plan.groups * parts * len(plan.pieces),
        warps=apart.warps,
        stages=plan.tiles.stages,
        interpret=interpret,
    )
    return {name: value.sum(axis=0).astype(read["inputs"].B.dtype) for name, value in done.items()}


def _keys_program(plan: Plan, parts: int, dot: Dot, read: Any, write: Any) -> None:
    """One piece of N of one group's B and C in one chunk, from some of its heads."""
    rest, piece = pallas.quotient_and_rest(pallas.program_id(), len(plan.pieces))
    rest, part = pallas.quotient_and_rest(rest, parts)
    rest, group = pallas.quotient_and_rest(rest, plan.groups)
    batch, strip = pallas.quotient_and_rest(rest, plan.tiles.strips)
    heads = plan.heads // plan.groups // parts
    steps, depth = plan.tiles.chunk, plan.tiles.depth
    first = (group * parts + part) * heads
    low, wide = read["inputs"].x.dtype, read["inputs"].steps.dt.dtype

    def step(k: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        inner, dB, dC = sums
        head, block = pallas.quotient_and_rest(k, plan.blocks)
        place = Place(plan, batch, strip, first + head, block, [piece * depth])
        chunk = Chunk.of(place, read["inputs"], read["dy"], 0)
        between = chunk.decays.between(transposed=True)
        inner = inner + dot(chunk.x, chunk.dy.T) * between * chunk.dt[:, None]
        (at,) = place.state(strip, plan.chunks)
        s, ds = pallas.load(read["saved"], *at).astype(low), pallas.load(read["exits"], *at).astype(low)
        dB = dB + (chunk.dt * chunk.to_end)[:, None] * dot(chunk.x, ds)
        return inner, dB, dC + chunk.from_start[:, None] * dot(chunk.dy, s)

    start = (jnp.zeros((steps, steps), wide), jnp.zeros((steps, depth), wide), jnp.zeros((steps, depth), wide))
    inner, dB, dC = jax.lax.fori_loop(0, heads * plan.blocks, step, start)
    inner = inner.astype(low)
    place = Place(plan, batch, strip, first, part, [piece * depth])
    (at,) = place.along_n(*place.chunk(0))
    b, c = pallas.load(read["inputs"].B, *at), pallas.load(read["inputs"].C, *at)
    offset = at[0] + part * (plan.batch * plan.time * plan.groups * plan.state_dim)
    pallas.store(write["B"], offset, at[1], dB + dot(inner, c))
    pallas.store(write["C"], offset, at[1], dC + dot(inner.T, b))
