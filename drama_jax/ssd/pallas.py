"""The SSD scan as GPU kernels: states of strips, outputs, gradients. Every Pallas name of `ssd` is in this file.

The sequence is cut into strips of whole chunks. A program owns one head (or some of its P) of one strip, holds the
state in registers and walks from chunk to chunk; inside a chunk it forms the masked attention of `chunked`.

* `strip_states`: what each strip adds to the state, forward, or to the state's gradient, backward in time. Not needed
  for one strip. What passes between strips is a scan over a few small arrays, left to XLA.
* `outputs`: y and the final state from the state that enters each strip; on request the state entering each chunk.
* `gradients`: everything else from those states, chunk by chunk from the end, recomputing what is inside a chunk.

Decays: the sum of dt A over a chunk is split into multiples of a power of two, which add up without any rounding,
and small rests, so that the difference of two sums is right to the last digit; see `_Decays`. Exponents are masked,
not exponentials, and none is positive. Matrix products take bfloat16 operands for bfloat16 inputs; for float32 inputs
each is three TF32 products of split operands (float32 to about 21 bits), never one. Sums are in float32.

Lowered through Triton, not Mosaic: Drama's N = 16 is below the tiles of Hopper's asynchronous products that Mosaic
exposes, Mosaic has no cumulative sum, and scaling operands between load and product is awkward there. The two were not
measured against each other. JAX deprecates this lowering since 0.11; `compiler_params` selects it on 0.10 and 0.11.

Letters as in `ssd`; Q steps of a chunk, `width` columns of P and S strips.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.precision import at_least_float32
from drama_jax.ssd.tiles import Inputs, Plan, Tiles

Pieces = tuple[jax.Array, ...]
"""A state [width, N] in pieces [width, depth]."""


class _Place:
    """Which batch row, head, strip and columns a program has, and its loads and stores."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # Neighbouring programs take neighbouring heads: they read the same B and C, and the same lines of dt.
        rest, self.head = _divmod(pl.program_id(0), plan.heads)
        rest, self.block = _divmod(rest, plan.blocks)
        self.batch, self.strip = _divmod(rest, plan.tiles.strips)
        self.group, _ = _divmod(self.head, plan.heads // plan.groups)
        self.row = jnp.arange(plan.tiles.chunk, dtype=jnp.int32)
        self.p = self.block * plan.tiles.width + jnp.arange(plan.tiles.width, dtype=jnp.int32)
        self.n = [start + jnp.arange(plan.tiles.depth, dtype=jnp.int32) for start in plan.pieces]
        # Masks that are known to be full are left out.
        self.p_valid = None if plan.head_dim % plan.tiles.width == 0 else self.p < plan.head_dim
        full = plan.state_dim % plan.tiles.depth == 0
        self.n_valid = [None if full else n < plan.state_dim for n in self.n]

    def chunk(self, k: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Times [Q] of the strip's chunk k, and which of them are in the sequence; None if all are in every chunk."""
        time = (self.strip * self.plan.walk + k) * self.plan.tiles.chunk + self.row
        return time, None if self.plan.chunks * self.plan.tiles.chunk == self.plan.time else time < self.plan.time

    def along_p(self, time: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Offsets and mask [Q, width] in arrays [B, T, H, P]."""
        start = ((self.batch * self.plan.time + time) * self.plan.heads + self.head) * self.plan.head_dim
        return start[:, None] + self.p[None, :], _both(valid, self.p_valid)

    def along_n(self, time: jax.Array, valid: jax.Array | None) -> list[tuple[jax.Array, jax.Array | None]]:
        """Offsets and mask [Q, depth] of each piece in arrays [B, T, G, N]."""
        start = ((self.batch * self.plan.time + time) * self.plan.groups + self.group) * self.plan.state_dim
        return [(start[:, None] + n[None, :], _both(valid, inside)) for n, inside in zip(self.n, self.n_valid)]

    def partial(self, time: jax.Array, valid: jax.Array | None) -> list[tuple[jax.Array, jax.Array | None]]:
        """Offsets and mask [Q, depth] of each piece in arrays [blocks, B, T, H, N]."""
        start = self.scalars(time) * self.plan.state_dim
        return [(start[:, None] + n[None, :], _both(valid, inside)) for n, inside in zip(self.n, self.n_valid)]

    def scalars(self, time: jax.Array) -> jax.Array:
        """Offsets [Q] in arrays [blocks, B, T, H]."""
        row = (self.block * self.plan.batch + self.batch) * self.plan.time + time
        return row * self.plan.heads + self.head

    def state(self, which: jax.Array | int, count: int) -> list[tuple[jax.Array, jax.Array | None]]:
        """Offsets and mask [width, depth] of each piece in arrays [B, H, count, P, N]."""
        row = (self.batch * self.plan.heads + self.head) * count + which
        start = (row * self.plan.head_dim + self.p) * self.plan.state_dim
        return [(start[:, None] + n[None, :], _both(self.p_valid, inside)) for n, inside in zip(self.n, self.n_valid)]


def _both(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    """The mask of a tile from those of its rows and columns, of which None is all."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


class _Decays:
    """Step sizes and decays of one chunk."""

    def __init__(self, place: _Place, steps: Any, time: jax.Array, valid: jax.Array | None) -> None:
        plan = place.plan
        # Comparisons below are of times, not of positions in the chunk: those would be the same in every chunk, and
        # be kept in registers by the thousand.
        self.time = time
        offset = (place.batch * plan.time + time) * plan.heads + place.head
        self.dt = _load(steps.dt, offset, valid)
        self.A = steps.A[place.head]
        coarse, fine = _split(self.dt * self.A)
        self.coarse, self.fine = jnp.cumsum(coarse), jnp.cumsum(fine)
        self.coarse_end, self.fine_end = jnp.sum(coarse), jnp.sum(fine)
        self.index: jax.Array | None = None
        if steps.index is not None:
            start = place.batch * plan.time
            last = plan.time - 1
            first = jnp.min(time)
            self.index = _load(steps.index, start + jnp.minimum(time, last), None)
            self.index_end = steps.index[start + jnp.minimum(first + plan.tiles.chunk - 1, last)]
            # The state before the first step belongs to index 0.
            before = steps.index[start + jnp.clip(first - 1, 0, last)]
            self.index_before = jnp.where(first == 0, 0, before)

    def between(self, *, transposed: bool = False) -> jax.Array:
        """[Q, Q], row i, column j <= i: the decay of what entered at j as seen at i; 0 elsewhere."""

        def pairs(of_i: jax.Array, of_j: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (of_i[None, :], of_j[:, None]) if transposed else (of_i[:, None], of_j[None, :])

        i, j = pairs(self.time, self.time)
        keep = i >= j
        if self.index is not None:
            i, j = pairs(self.index, self.index)
            keep = keep & (i == j)
        (coarse_i, coarse_j), (fine_i, fine_j) = pairs(self.coarse, self.coarse), pairs(self.fine, self.fine)
        exponent = (coarse_i - coarse_j) + (fine_i - fine_j)
        return jnp.exp(jnp.where(keep, exponent, -jnp.inf))

    def from_start(self) -> jax.Array:
        """[Q]: the decay of the entering state as seen at each step."""
        return self._exp(self.coarse + self.fine, self.index, "index_before")

    def to_end(self) -> jax.Array:
        """[Q]: the decay of what entered at each step as seen at the end of the chunk."""
        exponent = (self.coarse_end - self.coarse) + (self.fine_end - self.fine)
        return self._exp(exponent, self.index, "index_end")

    def whole(self) -> jax.Array:
        """The decay of the entering state over the chunk, a scalar."""
        index = None if self.index is None else self.index_end
        return self._exp(self.coarse_end + self.fine_end, index, "index_before")

    def _exp(self, exponent: jax.Array, index: jax.Array | None, same: str) -> jax.Array:
        if index is not None:
            exponent = jnp.where(index == getattr(self, same), exponent, -jnp.inf)
        return jnp.exp(exponent)


def _split(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Multiples of a power of two that add up exactly over 128 steps, and the rests."""
    # No decay below the limit differs from 0, and float32 holds sums up to 128 steps of it in units of the grid.
    limit, grid = (128.0, 2.0**-10) if log_decay.dtype == jnp.float32 else (1024.0, 2.0**-20)
    log_decay = jnp.maximum(log_decay, -limit)
    coarse = (log_decay * (1 / grid)).astype(jnp.int32).astype(log_decay.dtype) * grid
    return coarse, log_decay - coarse


def strip_states(
    values: jax.Array, keys: jax.Array, inputs: Inputs, tiles: Tiles, *, reverse: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The sum over each strip of decayed outer products of values and keys, and its decay.

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
    plan = Plan.of(inputs, tiles)
    wide = inputs.steps.dt.dtype

    def program(read: Any, write: Any) -> None:
        place = _Place(plan)

        def step(k: jax.Array, carry: tuple[Pieces, jax.Array]) -> tuple[Pieces, jax.Array]:
            state, decay = carry
            time, valid = place.chunk(plan.walk - 1 - k if reverse else k)
            decays = _Decays(place, read["steps"], time, valid)
            value = _load(read["values"], *place.along_p(time, valid))
            weight = decays.from_start() if reverse else decays.to_end() * decays.dt
            value, whole = _scaled(value, weight).T, decays.whole()
            keys = [_load(read["keys"], *at) for at in place.along_n(time, valid)]
            state = tuple(whole * piece + _dot(value, key, interpret) for piece, key in zip(state, keys))
            return state, decay * whole

        start = (_entry(place, None, wide), jnp.ones((), wide))
        state, decay = jax.lax.fori_loop(0, plan.walk, step, start)
        for at, piece in zip(place.state(place.strip, tiles.strips), state):
            _store(write["states"], *at, piece)
        # Every block of P writes the same number.
        write["decays"][(place.batch * plan.heads + place.head) * tiles.strips + place.strip] = decay

    shape = (plan.batch, plan.heads, tiles.strips)
    out = {"states": (*shape, plan.head_dim, plan.state_dim), "decays": shape}
    out_shapes = {name: jax.ShapeDtypeStruct(size, wide) for name, size in out.items()}
    name = "ssd_states_backward" if reverse else "ssd_states"
    done = _call(
        program, plan, {"values": values, "keys": keys, "steps": inputs.steps}, out_shapes, name, interpret, tiles.warps
    )
    return done["states"], done["decays"]


def outputs(
    inputs: Inputs, entry: jax.Array | None, tiles: Tiles, *, save: bool, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The scan from the state that enters each strip.

    Args:
      inputs: the operands.
      entry: `[B, H, S, P, N]` as dt, zeros if absent.
      tiles: how to cut.
      save: return the state that enters each chunk too.
      interpret: run without a GPU.

    Returns:
      y `[B, T, H, P]` as x, the final state `[B, H, P, N]` as dt, and `[B, H, chunks, P, N]` or None.
    """
    plan = Plan.of(inputs, tiles)
    wide = inputs.steps.dt.dtype

    def program(read: Any, write: Any) -> None:
        place, inputs = _Place(plan), read["inputs"]

        def step(k: jax.Array, state: Pieces) -> Pieces:
            if save:
                for at, piece in zip(place.state(place.strip * plan.walk + k, plan.chunks), state):
                    _store(write["saved"], *at, piece)
            time, valid = place.chunk(k)
            decays = _Decays(place, inputs.steps, time, valid)
            x = _load(inputs.x, *place.along_p(time, valid))
            at_n = place.along_n(time, valid)
            B, C = [_load(inputs.B, *at) for at in at_n], [_load(inputs.C, *at) for at in at_n]
            scores = _sum(_dot(c, b.T, interpret) for b, c in zip(B, C))
            attention = (scores * decays.between() * decays.dt[None, :]).astype(x.dtype)
            y = _sum(_dot(c, piece.astype(x.dtype).T, interpret) for c, piece in zip(C, state))
            y = decays.from_start()[:, None] * y + _dot(attention, x, interpret)
            if inputs.D is not None:
                y = y + inputs.D[place.head] * x.astype(wide)
            _store(write["y"], *place.along_p(time, valid), y)
            scaled, whole = _scaled(x, decays.to_end() * decays.dt).T, decays.whole()
            return tuple(whole * piece + _dot(scaled, b, interpret) for piece, b in zip(state, B))

        state = jax.lax.fori_loop(0, plan.walk, step, _entry(place, read["entry"], wide))
        for at, piece in zip(place.state(0, 1), state):
            _store(write["final"], *at, piece, place.strip == tiles.strips - 1)

    sizes = (plan.head_dim, plan.state_dim)
    out_shapes = {
        "y": jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
        "final": jax.ShapeDtypeStruct((plan.batch, plan.heads, *sizes), wide),
    }
    if save:
        out_shapes["saved"] = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.chunks, *sizes), wide)
    done = _call(program, plan, {"inputs": inputs, "entry": entry}, out_shapes, "ssd_outputs", interpret, tiles.warps)
    return done["y"], done["final"], done.get("saved")


def gradients(
    inputs: Inputs, saved: jax.Array, dy: jax.Array, exit_gradient: jax.Array | None, tiles: Tiles, *, interpret: bool
) -> dict[str, jax.Array]:
    """Gradients of all operands.

    Args:
      inputs: the operands of the scan.
      saved: `[B, H, chunks, P, N]` as dt, the state that enters each chunk.
      dy: the gradient of y, `[B, T, H, P]` as x.
      exit_gradient: of the state that leaves each strip, `[B, H, S, P, N]` as dt, zeros if absent.
      tiles: how to cut; the chunk is that of `outputs`.
      interpret: run without a GPU.

    Returns:
      "x" as x; "dt", "B", "C", "A", "D" as the operands, and "initial_state" `[B, H, P, N]`.
    """
    plan = Plan.of(inputs, tiles)
    wide = inputs.steps.dt.dtype

    def program(read: Any, write: Any) -> None:
        place, inputs = _Place(plan), read["inputs"]
        zero = jnp.zeros((), wide)

        def step(k: jax.Array, carry: tuple[Pieces, jax.Array, jax.Array]) -> tuple[Pieces, jax.Array, jax.Array]:
            ds, dA, dD = carry
            k = plan.walk - 1 - k
            time, valid = place.chunk(k)
            at_p, at_n = place.along_p(time, valid), place.along_n(time, valid)
            decays = _Decays(place, inputs.steps, time, valid)
            dt, to_end, from_start, whole = decays.dt, decays.to_end(), decays.from_start(), decays.whole()
            x, dy = _load(inputs.x, *at_p), _load(read["dy"], *at_p)
            low = x.dtype

            # Within the chunk y_i = sum over j of scores_ij between_ij dt_j x_j. All pairs are held transposed, [j, i].
            scores, v = jnp.zeros((tiles.chunk, tiles.chunk), wide), jnp.zeros((tiles.chunk, tiles.width), wide)
            for piece, at in zip(ds, at_n):
                b = _load(inputs.B, *at)
                scores = scores + _dot(b, _load(inputs.C, *at).T, interpret)
                v = v + _dot(b, piece.astype(low).T, interpret)
            between = decays.between(transposed=True)
            scores = scores * between
            v = to_end[:, None] * v + _dot(scores.astype(low), dy, interpret)  # gradient of dt_j x_j
            dx = dt[:, None] * v
            if inputs.D is not None:
                dx = dx + inputs.D[place.head] * dy.astype(wide)
            _store(write["x"], *at_p, dx)
            dscores = _dot(x, dy.T, interpret)
            if inputs.D is not None:
                dD = dD + jnp.sum(jnp.where(time[:, None] == time[None, :], dscores, 0))

            pairs = scores * dscores
            earlier = time[:, None] < time[None, :]
            passing = jnp.where(earlier, pairs, 0)
            from_j = jnp.sum(passing, axis=1)
            alone = jnp.sum(jnp.where(time[:, None] == time[None, :], pairs, 0), axis=1)
            crossing = _from_column(passing * dt[:, None], time, low, interpret)  # [j, t]

            # One piece of N after the other: all at once would not fit the registers.
            inner = (dscores * between * dt[:, None]).astype(low)
            scaled = _scaled(dy, from_start).T
            exit_j, entry_i, through, before = jnp.zeros_like(dt), jnp.zeros_like(dt), zero, []
            offsets = zip(at_n, place.partial(time, valid), place.state(place.strip * plan.walk + k, plan.chunks))
            for piece, (at, at_b, at_s) in zip(ds, offsets):
                # Read again, from the cache, for the same reason.
                b, c = _load(inputs.B, *at), _load(inputs.C, *at)
                s = _load(read["saved"], *at_s)
                through = through + jnp.sum(s * piece)
                by_entry = from_start[:, None] * _dot(dy, s.astype(low), interpret)
                entry_i = entry_i + jnp.sum(by_entry * c.astype(wide), axis=1)
                _store(write["C"], *at_b, by_entry + _dot(inner.T, b, interpret))
                by_exit = to_end[:, None] * _dot(x, piece.astype(low), interpret)
                exit_j = exit_j + jnp.sum(by_exit * b.astype(wide), axis=1)
                _store(write["B"], *at_b, dt[:, None] * by_exit + _dot(inner, c, interpret))
                before.append(whole * piece + _dot(scaled, c, interpret))

            # The decay of step t takes part in what passes from before t to t or later: from earlier steps, to the end
            # of the chunk, from its start. Each is added up by itself: as a difference of sums over all steps, which
            # is less work, strong decays would drown in what float32 leaves of it.
            da = jnp.where(earlier, crossing + (dt * exit_j)[:, None], entry_i[:, None])
            da = jnp.sum(da, axis=0) + whole * through
            _store(write["dt"], place.scalars(time), valid, from_j + alone + exit_j + decays.A * da)
            return tuple(before), dA + jnp.sum(dt * da), dD

        ds = _entry(place, read["exit"], wide)
        ds, dA, dD = jax.lax.fori_loop(0, plan.walk, step, (ds, zero, zero))
        for at, piece in zip(place.state(0, 1), ds):
            _store(write["initial_state"], *at, piece, place.strip == 0)
        write["A"][pl.program_id(0)] = dA
        write["D"][pl.program_id(0)] = dD

    split = (plan.blocks, plan.batch, plan.time, plan.heads)
    sums = (plan.batch, tiles.strips, plan.blocks, plan.heads)
    shapes = {"dt": split, "A": sums, "D": sums, "B": (*split, plan.state_dim), "C": (*split, plan.state_dim)}
    shapes["initial_state"] = (plan.batch, plan.heads, plan.head_dim, plan.state_dim)
    out_shapes = {name: jax.ShapeDtypeStruct(shape, wide) for name, shape in shapes.items()}
    out_shapes["x"] = jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype)
    read = {"inputs": inputs, "saved": saved, "dy": dy, "exit": exit_gradient}
    done = _call(program, plan, read, out_shapes, "ssd_gradients", interpret, tiles.backward_warps)

    def of_group(name: str) -> jax.Array:
        heads = plan.heads // plan.groups
        parts = done[name].reshape(*split[:3], plan.groups, heads, plan.state_dim)
        return parts.sum(axis=(0, 4)).astype(inputs.B.dtype)

    return done | {
        "dt": done["dt"].sum(axis=0),
        "A": done["A"].sum(axis=(0, 1, 2)),
        "D": done["D"].sum(axis=(0, 1, 2)),
        "B": of_group("B"),
        "C": of_group("C"),
    }


def _from_column(pairs: jax.Array, time: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """Sums [Q, Q] along the rows of pairs, each from a column on, as a product with ones."""
    ones = (time[:, None] >= time[None, :]).astype(dtype)
    low = pairs.astype(dtype)
    if dtype == pairs.dtype:
        return _dot(low, ones, interpret)
    return _dot(low, ones, interpret) + _dot((pairs - low.astype(pairs.dtype)).astype(dtype), ones, interpret)


def _entry(place: _Place, states: Any, dtype: Any) -> Pieces:
    """The pieces of the strip's state from `[B, H, S, P, N]`, or zeros."""
    tiles = place.plan.tiles
    if states is None:
        return tuple(jnp.zeros((tiles.width, tiles.depth), dtype) for _ in place.n)
    return tuple(_load(states, *at) for at in place.state(place.strip, tiles.strips))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _scaled(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """rows [Q, ..] times weight [Q], in the dtype of rows."""
    return (rows.astype(weight.dtype) * weight[:, None]).astype(rows.dtype)


def _dot(a: jax.Array, b: jax.Array, interpret: bool) -> jax.Array:
    precision: Any = None
    if a.dtype == jnp.float32:
        # Left alone, Triton would take one TF32 product, of three digits. The interpreter does not know the triple.
        precision = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=at_least_float32(a.dtype))


def _load(ref: Any, offset: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return pltriton.load(ref.at[offset])
    return pltriton.load(ref.at[offset], mask=jnp.broadcast_to(mask, offset.shape), other=0)


def _store(
    ref: Any, offset: jax.Array, mask: jax.Array | None, value: jax.Array, only: jax.Array | None = None
) -> None:
    """Writes where the mask holds, if `only` does."""
    if only is not None:
        mask = only if mask is None else mask & only
    mask = None if mask is None else jnp.broadcast_to(mask, offset.shape)
    pltriton.store(ref.at[offset], value.astype(ref.dtype), mask=mask)


def _divmod(x: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of non-negative numbers; `//` and `%` would handle signs, which does not lower."""
    quotient = jax.lax.div(x, jnp.full_like(x, divisor))
    return quotient, x - quotient * divisor


def _call(
    program: Callable[[Any, Any], None],
    plan: Plan,
    operands: Any,
    out_shapes: dict[str, jax.ShapeDtypeStruct],
    name: str,
    interpret: bool,
    warps: int,
) -> dict[str, jax.Array]:
    """Runs `program(read, write)`, which see every array flat; returns the outputs by name."""
    leaves, tree = jax.tree.flatten(operands)
    names = list(out_shapes)

    def kernel(*refs: Any) -> None:
        program(jax.tree.unflatten(tree, refs[: len(leaves)]), dict(zip(names, refs[len(leaves) :])))

    flat = pl.pallas_call(
        kernel,
        grid=(plan.programs,),
        out_shape=[jax.ShapeDtypeStruct((math.prod(out.shape),), out.dtype) for out in out_shapes.values()],
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=plan.tiles.stages),
        interpret=interpret,
        name=name,
    )(*[leaf.reshape(-1) for leaf in leaves])
    return {name: value.reshape(out_shapes[name].shape) for name, value in zip(names, flat)}
