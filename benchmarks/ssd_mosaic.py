"""The forward SSD scan through Pallas's other GPU lowering, Mosaic GPU: errors and times beside the Triton kernels'.

    python -m benchmarks.ssd_mosaic              every way to make the kernel at three shapes, bfloat16
    python -m benchmarks.ssd_mosaic --check      only the errors

The equations are those of `drama_jax.ssd.gpu_forward`. A program has one head, or one for each of two warpgroups that
share B and C. It walks over chunks of 64 steps with the float32 state in registers, while the next chunk is on its way
by TMA. All matrix products are Hopper's asynchronous ones, of bfloat16 operands into float32 sums. Without D, initial
state, resets and strips. Needs an H100 or H200, and jax 0.11 (made with 0.11.2).

Mosaic has no cumulative sum. By `sums`, XLA makes the running sums of dt A in kernels of its own before ("xla"), or
the program does by a masked sum over a square ("inside"). Errors are largest differences over the largest value, from
`ssd(implementation="chunked")` in float32; times as in `benchmarks.ssd`; a row, a process (`benchmarks.processes`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import processes
from benchmarks import ssd as bench
from drama_jax.ssd import fused, ssd

Q = 64
"""Steps of a chunk: the rows of one asynchronous product."""
P = 64
"""The only head size."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the kernel is made."""

    registers: bool = True
    """Products take the operands that the program makes itself from registers, not through shared memory."""
    sums: str = "xla"
    """Who adds up dt A: "xla" or "inside"; the latter takes H in multiples of 8."""
    warpgroups: int = 1
    """Heads, of 128 threads each, that a program has."""
    stages: int = 2
    """Chunks in shared memory."""
    barriers: bool = True
    """Pallas puts a barrier at every access to shared memory; not needed where no thread reads what one has written."""


VARIANTS = {
    "mosaic": Variant(),
    "mosaic_shared": Variant(registers=False),
    "mosaic_bare": Variant(barriers=False),
    "mosaic_inside": Variant(sums="inside"),
    "mosaic_pair": Variant(warpgroups=2),
    "mosaic_pair_bare": Variant(warpgroups=2, barriers=False),
    "mosaic_pair_inside": Variant(sums="inside", warpgroups=2),
}


@functools.partial(jax.jit, static_argnames=("variant", "interpret"))  # or each call in a chain is lowered anew
def scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    variant: Variant = VARIANTS["mosaic"],
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence in bfloat16.

    Args:
      x: `[B, T, H, 64]` bfloat16, T a multiple of 64.
      dt: `[B, T, H]` float32.
      A: `[H]` float32.
      B: `[B, T, 1, N]` bfloat16, N = 16, 32 or a multiple of 64 up to 128.
      C: as B.
      variant: how the kernel is made.
      interpret: `plgpu.InterpretGPUParams()` to run without a GPU; only variants without `registers`.

    Returns:
      y `[B, T, H, 64]` bfloat16 and the final state `[B, H, 64, N]` float32.

    Raises:
      ValueError: for other sizes or dtypes.
    """
    batch, time, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    if time % Q or head_dim != P or groups != 1 or state_dim not in (16, 32, 64, 128) or heads % variant.warpgroups:
        raise ValueError(f"x {x.shape} and B {B.shape} are not of the sizes that the kernel takes")
    if {x.dtype, B.dtype, C.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"it takes bfloat16, got {x.dtype}, {B.dtype} and {C.dtype}")
    if variant.sums == "inside" and not variant.barriers:
        raise ValueError("sums made inside are written and read in shared memory, which takes barriers")
    if variant.sums == "inside":
        steps: tuple[jax.Array, ...] = (dt, A)
    else:
        step = jnp.swapaxes(dt, 1, 2).reshape(batch, heads, time // Q, Q)
        # [B, H, T / Q, 2, Q]
        steps = (jnp.stack([step, jnp.cumsum(step * A[:, None, None], axis=-1)], axis=3),)
    call: Any = plgpu.kernel(
        functools.partial(_program, variant=variant),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, heads, P, state_dim), jnp.float32),
        ),
        scratch_types={"smem": _scratch(variant, heads, state_dim)},
        grid=(batch, heads // variant.warpgroups),
        grid_names=("batch", "heads"),
        num_threads=variant.warpgroups,
        thread_name="warpgroup",
        # Layouts are given by hand: the search for them ("Warpgroup", the default) finds none for transposed operands,
        # and takes minutes. Exponentials are approximate to a few float32 digits, far below bfloat16.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=not variant.barriers,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
    return call(x, B, C, steps)


def _scratch(variant: Variant, heads: int, state_dim: int) -> dict[str, Any]:
    """Shared memory and barriers of a program."""
    count, stages = variant.warpgroups, variant.stages
    inside = variant.sums == "inside"
    found = {
        "x": _tiles((count, stages, Q, P)),
        "B": _tiles((stages, Q, state_dim)),
        "C": _tiles((stages, Q, state_dim)),
        "state": _tiles((count, P, state_dim)),
        "y": _tiles((count, Q, P)),
        # Step sizes, and sums of dt A.
        "steps": plgpu.SMEM((count, 1 if inside else stages, 2, Q), jnp.float32),
        # Copies of a chunk that have come: a warpgroup's own, and those that all of a program use.
        "own": plgpu.Barrier(num_arrivals=1 if inside else 2, num_barriers=count * stages),
        "common": plgpu.Barrier(num_arrivals=3 if inside else 2, num_barriers=stages),
        # Warpgroups that are done with a chunk.
        "done": plgpu.Barrier(num_arrivals=count, num_barriers=stages),
    }
    if inside:
        found["dt"] = plgpu.SMEM((stages, Q, heads), jnp.float32)
    if not variant.registers:
        found["attention"] = _tiles((count, Q, Q))
        # Both operands of a product have to be swizzled alike, and the other one is B.
        found["value"] = _tiles((count, Q, P), narrow=state_dim)
    return found


def _tiles(shape: tuple[int, ...], narrow: int = 64) -> Any:
    """A bfloat16 buffer, swizzled as the products want it, in tiles of up to 64 columns."""
    columns = min(64, narrow, shape[-1])
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _program(x: Any, B: Any, C: Any, steps: Any, y: Any, final: Any, smem: Any, *, variant: Variant) -> None:
    """One head per warpgroup, all chunks; arguments but `variant` are references, y and final are written."""
    me, batch = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("batch")
    head = jax.lax.axis_index("heads") * variant.warpgroups + me
    chunks, stages, inside = x.shape[1] // Q, variant.stages, variant.sums == "inside"

    def fetch(k: Any, slot: Any) -> None:
        """Starts the copies of chunk k."""
        time, own = pl.ds(k * Q, Q), smem["own"].at[me * stages + slot]
        plgpu.copy_gmem_to_smem(x.at[batch, time, head], smem["x"].at[me, slot], own)
        if not inside:
            plgpu.copy_gmem_to_smem(steps[0].at[batch, head, k], smem["steps"].at[me, slot], own)

        @pl.when(me == 0)
        def _() -> None:
            common = smem["common"].at[slot]
            plgpu.copy_gmem_to_smem(B.at[batch, time, 0], smem["B"].at[slot], common)
            plgpu.copy_gmem_to_smem(C.at[batch, time, 0], smem["C"].at[slot], common)
            if inside:
                plgpu.copy_gmem_to_smem(steps[0].at[batch, time], smem["dt"].at[slot], common)

    def step(k: jax.Array, state: jax.Array) -> jax.Array:
        slot, last = jax.lax.rem(k, jnp.int32(stages)), jax.lax.rem(k + stages - 1, jnp.int32(stages))

        # The chunk before is done with, and its place free for the one `stages` later.
        @pl.when((k > 0) & (k + stages - 1 < chunks))
        def _() -> None:
            plgpu.barrier_wait(smem["done"].at[last])
            fetch(k + stages - 1, last)

        plgpu.barrier_wait(smem["own"].at[me * stages + slot])
        plgpu.barrier_wait(smem["common"].at[slot])
        own = {name: smem[name].at[me] for name in ("state", "y", "attention", "value") if name in smem}
        chunk = own | {"x": smem["x"].at[me, slot], "B": smem["B"].at[slot], "C": smem["C"].at[slot]}
        if inside:
            chunk["steps"] = smem["steps"].at[me, 0]
            _add_up(smem["dt"].at[slot], steps[1][head], head, chunk["steps"])
        else:
            chunk["steps"] = smem["steps"].at[me, slot]
        out, state = _chunk(chunk, state, variant.registers)

        @pl.when(k + stages < chunks)
        def _() -> None:
            plgpu.barrier_arrive(smem["done"].at[slot])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before
        chunk["y"][...] = out.astype(y.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(chunk["y"], y.at[batch, pl.ds(k * Q, Q), head])
        return state

    for k in range(min(stages, chunks)):
        fetch(k, k)
    zeros = plgpu.layout_cast(jnp.zeros((P, B.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
    final[batch, head] = jax.lax.fori_loop(0, chunks, step, zeros)
    plgpu.wait_smem_to_gmem(0)


def _add_up(dt: Any, A: jax.Array, head: jax.Array, steps: Any) -> None:
    """Writes step sizes and running sums of dt A to steps [2, Q], from dt [Q, H] of all heads."""
    every = _load(dt, plgpu.Layout.WGMMA, optimized=False)
    steps[0] = jnp.sum(jnp.where(_iota(every.shape, 1) == head, every, 0.0), axis=1)
    plgpu.commit_smem()
    added = _columns(_along(steps.at[0], 0) * A, Q)
    steps[1] = jnp.sum(jnp.where(_iota((Q, Q), 0) >= _iota((Q, Q), 1), added, 0.0), axis=1)
    plgpu.commit_smem()


def _chunk(smem: dict[str, Any], state: jax.Array, registers: bool) -> tuple[jax.Array, jax.Array]:
    """y [Q, P] of a chunk and the state [P, N] after it, both float32.

    Two rounds of two products; what the second needs is made while the first is under way.
    """
    smem["state"][...] = state.astype(jnp.bfloat16)
    plgpu.commit_smem()
    dt_j, end = _along(smem["steps"].at[0], 0), smem["steps"][1, Q - 1]
    sum_i, sum_j = _along(smem["steps"].at[1], 1), _along(smem["steps"].at[1], 0)

    def first(scores: Any, entering: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        plgpu.wgmma(scores, smem["C"], smem["B"].transpose((1, 0)))
        plgpu.wgmma(entering, smem["C"], smem["state"].transpose((1, 0)))
        # The exponent is masked, not the exponential, which could overflow.
        keep = _iota((Q, Q), 0) >= _iota((Q, Q), 1)
        weights = jnp.exp(jnp.where(keep, _rows(sum_i, Q) - _columns(sum_j, Q), -jnp.inf)) * _columns(dt_j, Q)
        # x scaled by what of it is left at the end; [P, Q] from registers, which cannot be transposed there.
        x = smem["x"].transpose((1, 0)) if registers else smem["x"]
        value = _load(x, plgpu.Layout.WGMMA).astype(jnp.float32)
        if registers:
            value = value * _columns(jnp.exp(end - sum_j) * dt_j, P)
        else:
            value = value * _rows(jnp.exp(end - sum_i) * _along(smem["steps"].at[0], 1), P)
        return (scores[...] * weights).astype(jnp.bfloat16), entering[...], value.astype(jnp.bfloat16)

    attention, entering, value = pl.run_scoped(first, _sums(Q), _sums(P))
    if not registers:
        smem["attention"][...], smem["value"][...] = attention, value
        plgpu.commit_smem()
        attention, value = smem["attention"], smem["value"].transpose((1, 0))

    def second(out: Any, added: Any) -> tuple[jax.Array, jax.Array]:
        plgpu.wgmma(out, attention, smem["x"])
        plgpu.wgmma(added, value, smem["B"])
        return _rows(jnp.exp(sum_i), P) * entering + out[...], jnp.exp(end) * state + added[...]

    return pl.run_scoped(second, _sums(P), _sums(state.shape[1]))


def _sums(columns: int) -> Any:
    """[64, columns] of a product, in registers."""
    return plgpu.ACC((64, columns), jnp.float32)


def _load(tile: Any, layout: Any, **how: Any) -> jax.Array:
    load: Any = plgpu.load  # of jax 0.11; that of 0.10 has other arguments
    return load(tile, layout=layout, **how)


def _along(vector: Any, axis: int) -> jax.Array:
    """[64] from shared memory, laid out as the sum over `axis` of a product would be."""
    return _load(vector, plgpu.Layout.WGMMA.reduce(axis))


def _rows(vector: jax.Array, columns: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (vector.size, columns), (0,))


def _columns(vector: jax.Array, rows: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (rows, vector.size), (1,))


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def row(case: str, name: str, only_check: bool) -> dict[str, Any]:
    """Errors and time of one implementation: one of `VARIANTS`, "pallas", or "pallas_walk" that has no strips."""
    inputs = bench.operands((bench.CASES | bench.TINY)[case], jnp.bfloat16)
    del inputs["D"]
    function: bench.Scan
    if name in VARIANTS:
        function = functools.partial(scan, variant=VARIANTS[name])
    elif name == "pallas":
        function = functools.partial(ssd, implementation="pallas")
    else:
        tiles = dataclasses.replace(fused.default_tiles(inputs["x"], inputs["B"]), strips=1)
        function = functools.partial(fused.ssd_pallas, tiles=tiles)
    exact = {key: value.astype(jnp.float32) for key, value in inputs.items()}
    expected = jax.jit(functools.partial(ssd, implementation="chunked"))(**exact)
    found: dict[str, Any] = {}
    for key, ours, theirs in zip(("y", "state"), jax.jit(function)(**inputs), expected):
        difference = jnp.max(jnp.abs(ours.astype(jnp.float32) - theirs)) / jnp.max(jnp.abs(theirs))
        found[f"{key}_error"] = float(difference)
    if not only_check:
        found["forward_ms"] = bench.chained_ms(functools.partial(bench.forward, function), inputs)
    return found


def main() -> None:
    """Command line."""
    default = ["drama_train", "drama_1k", "lm_2k"]
    implementations = ["pallas", "pallas_walk", *VARIANTS]
    processes.main("ssd_mosaic", __doc__, row, list(bench.CASES), implementations, default=default)


if __name__ == "__main__":
    main()
