"""The forward kernels of the SSD scan: states of strips, and outputs.

* `strip_states`: what each strip adds to the state, forward, or to the state's gradient, backward in time. Not needed
  for one strip.
* `outputs`: y and the final state; on request the state entering each chunk. Each program first goes through what the
  strips before its own add.

A program holds the state in registers and walks from chunk to chunk. With s the state that enters a chunk of steps
1 to Q, and the decays of `decays`:

    y_i = from_start_i s C_i + sum over j <= i of (C_i . B_j) between_ij dt_j x_j + D x_i
    s   becomes  whole s + sum over j of to_end_j dt_j x_j (outer) B_j

Matrix products take bfloat16 operands for bfloat16 inputs; for float32 inputs each is three TF32 products of split
operands, never one. Sums are in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from drama_jax.ssd import pallas
from drama_jax.ssd.decays import Decays, scaled
from drama_jax.ssd.places import Pieces, Place
from drama_jax.ssd.tiles import Ends, Inputs, Plan, Tiles

Dot = Callable[[jax.Array, jax.Array], jax.Array]


@functools.partial(jax.jit, static_argnames=("tiles", "reverse", "interpret"))
def strip_states(
    values: jax.Array, keys: jax.Array, inputs: Inputs, tiles: Tiles, *, reverse: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The sum over each strip of decayed outer products of values and keys, and its decay, but for the last one.

    No strip comes behind the last (`reverse`: the first) one: its numbers are left undefined.

    Args:
      values: `[B, T, H, P]`: x, or the gradient of y if `reverse`.
      keys: `[B, T, G, N]`: B, or C if `reverse`.
      inputs: dt, A and index are read.
      tiles: how to cut.
      reverse: sum towards the strip's start, for the gradient of the state that enters it.
      interpret: run without a GPU.

    Returns:
      `[B, H, S, P, N]` and the decay of a state over each strip `[B, H, S]`, in dt's dtype.
    """
    plan, wide = Plan.of(inputs, tiles), inputs.steps.dt.dtype
    dot = functools.partial(pallas.dot, interpret=interpret)
    strips = range(1, tiles.strips) if reverse else range(tiles.strips - 1)

    def program(read: Any, write: Any) -> None:
        place = Place.of_program(plan, strips)

        def step(k: jax.Array, carry: tuple[Pieces, jax.Array]) -> tuple[Pieces, jax.Array]:
            state, decay = carry
            state, whole = with_chunk(place, read, state, plan.walk - 1 - k if reverse else k, dot, reverse=reverse)
            return state, decay * whole

        zeros = tuple(jnp.zeros((tiles.width, tiles.depth), wide) for _ in plan.pieces)
        state, decay = jax.lax.fori_loop(0, plan.walk, step, (zeros, jnp.ones((), wide)))
        for at, piece in zip(place.state(place.strip, tiles.strips), state):
            pallas.store(write["states"], *at, piece)
        # Every block of P writes the same number.
        write["decays"][(place.batch * plan.heads + place.head) * tiles.strips + place.strip] = decay

    shape = (plan.batch, plan.heads, tiles.strips)
    done = pallas.call(
        program,
        {"values": values, "keys": keys, "steps": inputs.steps},
        {
            "states": jax.ShapeDtypeStruct((*shape, plan.head_dim, plan.state_dim), wide),
            "decays": jax.ShapeDtypeStruct(shape, wide),
        },
        name="ssd_states_backward" if reverse else "ssd_states",
        programs=plan.programs // tiles.strips * len(strips),
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return done["states"], done["decays"]


def with_chunk(
    place: Place, read: Any, state: Pieces, k: jax.Array, dot: Dot, *, reverse: bool
) -> tuple[Pieces, jax.Array]:
    """The state beyond chunk k, whole s + sum over j of weight_j values_j (outer) keys_j, and `whole`.

    `read` holds references to values, keys and steps; see `strip_states`.
    """
    time, valid = place.chunk(k)
    decays = Decays(place, read["steps"], time, valid)
    value = pallas.load(read["values"], *place.along_p(time, valid))
    weight = decays.from_start() if reverse else decays.to_end() * decays.dt
    value, whole = scaled(value, weight).T, decays.whole()
    keys = [pallas.load(read["keys"], *at) for at in place.along_n(time, valid)]
    return tuple(whole * piece + dot(value, key) for piece, key in zip(state, keys)), whole


@functools.partial(jax.jit, static_argnames=("tiles", "save", "interpret"))
def outputs(
    inputs: Inputs, ends: Ends, tiles: Tiles, *, save: bool, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The scan, from the initial state and what the strips add to it.

    Args:
      inputs: the operands.
      ends: from `strip_states`.
      tiles: how to cut.
      save: return the state that enters each chunk too.
      interpret: run without a GPU.

    Returns:
      y `[B, T, H, P]` as x, the final state `[B, H, P, N]` as dt, and `[B, H, chunks, P, N]` or None.
    """
    plan, wide = Plan.of(inputs, tiles), inputs.steps.dt.dtype
    dot = functools.partial(pallas.dot, interpret=interpret)

    def program(read: Any, write: Any) -> None:
        place = Place.of_program(plan)

        def step(k: jax.Array, state: Pieces) -> Pieces:
            if save:
                for at, piece in zip(place.state(place.strip * plan.walk + k, plan.chunks), state):
                    pallas.store(write["saved"], *at, piece)
            return _chunk_output(place, read["inputs"], write, state, k, dot)

        state = jax.lax.fori_loop(0, plan.walk, step, place.start_of_walk(read["ends"], wide, reverse=False))
        for at, piece in zip(place.state(0, 1), state):
            pallas.store(write["final"], *at, piece, place.strip == tiles.strips - 1)

    sizes = (plan.head_dim, plan.state_dim)
    out_shapes = {
        "y": jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
        "final": jax.ShapeDtypeStruct((plan.batch, plan.heads, *sizes), wide),
    }
    if save:
        out_shapes["saved"] = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, *sizes), wide)
    done = pallas.call(
        program,
        {"inputs": inputs, "ends": ends},
        out_shapes,
        name="ssd_outputs",
        programs=plan.programs,
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return done["y"], done["final"], done.get("saved")


def _chunk_output(place: Place, inputs: Any, write: Any, state: Pieces, k: jax.Array, dot: Dot) -> Pieces:
    """Writes y of chunk k, and returns the state after it; both equations of the module's docstring."""
    time, valid = place.chunk(k)
    decays = Decays(place, inputs.steps, time, valid)
    x = pallas.load(inputs.x, *place.along_p(time, valid))
    at_n = place.along_n(time, valid)
    B, C = [pallas.load(inputs.B, *at) for at in at_n], [pallas.load(inputs.C, *at) for at in at_n]
    scores = _sum(dot(c, b.T) for b, c in zip(B, C))
    attention = (scores * decays.between() * decays.dt[None, :]).astype(x.dtype)
    y = _sum(dot(c, piece.astype(x.dtype).T) for c, piece in zip(C, state))
    y = decays.from_start()[:, None] * y + dot(attention, x)
    if inputs.D is not None:
        y = y + inputs.D[place.head] * x.astype(y.dtype)
    pallas.store(write["y"], *place.along_p(time, valid), y)
    value, whole = scaled(x, decays.to_end() * decays.dt).T, decays.whole()
    return tuple(whole * piece + dot(value, b) for piece, b in zip(state, B))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)
