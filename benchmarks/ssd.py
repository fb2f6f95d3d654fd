"""The SSD scan: milliseconds, memory and floors at the named shapes, and time against T beside softmax attention.

    python -m benchmarks.ssd                     all shapes, bfloat16 and then float32, and the sweep over T
    python -m benchmarks.ssd --cases             the sweep alone
    python -m benchmarks.ssd --check             the contract of tests/ssd on this device, as a log under results/
    python -m benchmarks.ssd --accuracy          errors against float64, the table of the module's docstring
    python -m benchmarks.ssd --tune              how the kernels can be cut at each shape
    python -m benchmarks.ssd --tune --strips     of that, into how many strips
    python -m benchmarks.ssd --picture FILE      draws a result file (needs matplotlib)

A file for each dtype, `ssd` and `ssd_float32`, and one for the sweep, `ssd_lengths`.

Every time is that of one call of many in one compiled function, each fed with the output of the one before, and of
several calls of that function queued before one is waited for: what the device needs. `*_dispatch_ms` is one call from
Python that waits for its result. `floor_ms` is reading the operands and writing the results once at the card's measured
bandwidth, and `*_ratio` the time over it. `peak_bytes` is what the compiled forward and backward pass allocates besides
its arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, ssd_check
from drama_jax.ssd import Implementation, fused, ssd
from drama_jax.ssd.tiles import Apart, Tiles

Shape = tuple[int, int, int, int, int]
CASES: dict[str, Shape] = {  # B, T, H, P, N
    "drama_train": (16, 128, 16, 64, 16),
    "drama_1k": (16, 1024, 16, 64, 16),
    "drama_8k": (4, 8192, 16, 64, 16),
    "lm_2k": (8, 2048, 24, 64, 128),
    "lm_8k": (2, 8192, 24, 64, 128),
    "lm_64k": (1, 65536, 24, 64, 128),
}
TINY: dict[str, Shape] = {"tiny": (2, 64, 2, 16, 16)}
LENGTHS = [2**n for n in range(7, 17)]
STRIPS = [1, 2, 4, 8]
"""Those that divide the number of chunks: with others in one direction alone, the states that the forward pass saves
are copied for the backward pass to fit its chunks."""
LINKED = 10 * 2**24
"""Numbers of x that the calls in one function take together, so that it runs for longer than its dispatch takes."""
Operands = dict[str, jax.Array]
Scan = Callable[..., tuple[jax.Array, jax.Array]]
Cuts = Callable[[Operands], list[Tiles]]


def operands(shape: Shape, dtype: Any) -> Operands:
    """Random operands, G = 1."""
    batch, time, heads, head_dim, state_dim = shape
    keys = iter(jax.random.split(jax.random.key(0), 6))
    return {
        "x": jax.random.normal(next(keys), (batch, time, heads, head_dim), dtype),
        "dt": jax.random.uniform(next(keys), (batch, time, heads), jnp.float32, 0.001, 0.1),
        "A": -jax.random.uniform(next(keys), (heads,), jnp.float32, 1.0, 16.0),
        "B": jax.random.normal(next(keys), (batch, time, 1, state_dim), dtype),
        "C": jax.random.normal(next(keys), (batch, time, 1, state_dim), dtype),
        "D": jax.random.normal(next(keys), (heads,), jnp.float32),
    }


def forward(scan: Scan, inputs: Operands) -> Any:
    """y and the final state."""
    return scan(**inputs)


def forward_backward(scan: Scan, inputs: Operands) -> Any:
    """The gradient of every operand, and what the forward pass returns."""
    out, backward = jax.vjp(lambda inputs: scan(**inputs), inputs)
    # A gradient of ones would let the compiler simplify; x has y's shape.
    return backward((inputs["x"], jnp.ones_like(out[1])))[0], out


def chained_ms(function: Callable[[Operands], Any], inputs: Operands, links: int | None = None) -> float:
    """Milliseconds of one of `links` calls (3 to 50 by `LINKED` if None), each with the x that the last returned."""
    if links is None:
        links = max(3, min(50, LINKED // inputs["x"].size))

    @jax.jit
    def chain(inputs: Operands) -> Any:
        # Written out, not a loop, which would copy what it carries; all results are returned, or XLA would leave out
        # what the next call does not need.
        found = []
        for _ in range(links):
            out = function(inputs)
            x = out[0]["x"] if isinstance(out[0], dict) else out[0]
            # The barrier hides that the other operands stay the same: what depends on them alone would be shared.
            inputs = jax.lax.optimization_barrier(inputs | {"x": x})
            found.append(out)
        return found

    rounds = [common.queued_ms(lambda: chain(inputs), repeats=5, warmup=1) for _ in range(5)]
    return statistics.median(rounds) / links


def measured(scan: Scan, inputs: Operands, links: int | None) -> dict[str, Any]:
    """Both passes of one implementation."""
    row: dict[str, Any] = {}
    for name, function in (("forward", forward), ("forward_backward", forward_backward)):
        run = functools.partial(function, scan)
        row[f"{name}_ms"] = chained_ms(run, inputs, links)
        compiled = jax.jit(run).lower(inputs).compile()
        row[f"{name}_dispatch_ms"] = common.median_ms(functools.partial(compiled, inputs))
        memory: Any = compiled.memory_analysis()
        row[f"{name}_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    row["peak_bytes"] = row.pop("forward_backward_bytes")
    row.pop("forward_bytes")
    return row


def floors(inputs: Operands) -> dict[str, float]:
    """Milliseconds to read every operand and write every result once."""
    bandwidth = common.CEILINGS.get(common.device_name(), {}).get("bytes_per_s")
    if bandwidth is None:
        return {}
    size = {name: value.nbytes for name, value in inputs.items()}
    read, x = sum(size.values()), size["x"]
    # Forward: the operands and y. Backward: the operands again, dy and as many gradients.
    return {"floor_ms": (read + x) / bandwidth * 1e3, "forward_backward_floor_ms": (3 * read + 2 * x) / bandwidth * 1e3}


def implementations() -> list[Implementation]:
    """Those that run here; the token scan is no candidate."""
    return ["chunked", "pallas"] if jax.default_backend() == "gpu" else ["chunked"]


def case_rows(cases: dict[str, Shape], dtype: str, links: int | None) -> Iterator[dict[str, Any]]:
    """One row per shape and implementation."""
    for name, shape in cases.items():
        inputs = operands(shape, jnp.dtype(dtype))
        for implementation in implementations():
            scan = functools.partial(ssd, implementation=implementation)
            row = measured(scan, inputs, links) | floors(inputs)
            for direction, floor in (("forward", "floor_ms"), ("forward_backward", "forward_backward_floor_ms")):
                if floor in row:
                    row[f"{direction}_ratio"] = row[f"{direction}_ms"] / row[floor]
            yield {"name": name, "shape": shape, "implementation": implementation, "dtype": dtype} | row


def attention(x: jax.Array, **_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Causal softmax attention of the same width, with x as queries, keys and values; and a small second result."""
    kind: Any = "cudnn" if jax.default_backend() == "gpu" else "xla"
    y = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation=kind)
    return y, y[:, -1].astype(jnp.float32)


def sweep_rows(shape: Shape, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Time against T at fixed B, bfloat16; then the exponents fitted beyond 4,096 steps."""
    scans: dict[str, Scan] = {"attention": attention}
    for implementation in implementations():
        scans[implementation] = functools.partial(ssd, implementation=implementation)
    for name, scan in scans.items():
        points: dict[str, list[tuple[int, float]]] = {"forward_ms": [], "forward_backward_ms": []}
        for time in lengths:
            inputs = operands((shape[0], time, *shape[2:]), jnp.bfloat16)
            row = {
                "forward_ms": chained_ms(functools.partial(forward, scan), inputs),
                "forward_backward_ms": chained_ms(functools.partial(forward_backward, scan), inputs),
            }
            for key, value in row.items():
                points[key].append((time, value))
            yield {"name": "sweep", "implementation": name, "dtype": "bfloat16", "T": time} | row
        exponents = {key.replace("ms", "exponent"): exponent(value) for key, value in points.items()}
        yield {"name": "exponent", "implementation": name, "dtype": "bfloat16"} | exponents


def exponent(points: list[tuple[int, float]], beyond: int = 4096) -> float | None:
    """The slope of log time over log T by least squares, from `beyond` steps on; None from fewer than two points."""
    logs = [(math.log(time), math.log(ms)) for time, ms in points if time >= beyond]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def tune_rows(cases: dict[str, Shape], dtypes: list[str], cuts: Cuts) -> Iterator[dict[str, Any]]:
    """Every way of `cuts` to cut the work."""
    for name, shape in cases.items():
        for dtype in dtypes:
            inputs = operands(shape, jnp.dtype(dtype))
            for tiles in cuts(inputs):
                scan = functools.partial(fused.ssd_pallas, tiles=tiles)
                row: dict[str, Any] = {"name": name, "dtype": dtype, "tiles": repr(tiles)}
                try:
                    row["forward_ms"] = chained_ms(functools.partial(forward, scan), inputs)
                    row["forward_backward_ms"] = chained_ms(functools.partial(forward_backward, scan), inputs)
                except jax.errors.JaxRuntimeError as error:  # too much shared memory
                    row["error"] = str(error).splitlines()[0][:120]
                yield row


def strips(inputs: Operands) -> list[Tiles]:
    """The default, and with every number of strips in either direction."""
    default = fused.default_tiles(inputs["x"], inputs["B"])
    pairs = itertools.product(STRIPS, STRIPS)
    found = [dataclasses.replace(default, strips=there, backward_strips=back) for there, back in pairs]
    return list(dict.fromkeys([default, *found]))


def all_cuts(inputs: Operands) -> list[Tiles]:
    """Chunks, widths and warps worth trying, and the default with one thing changed."""
    default = fused.default_tiles(inputs["x"], inputs["B"])
    found = [
        dataclasses.replace(default, chunk=chunk, width=width, warps=warps, backward_warps=warps)
        for chunk in (32, 64)
        for width in (32, 64)
        for warps in (4, 8)
        if width <= inputs["x"].shape[-1]
    ]
    found += [dataclasses.replace(default, stages=stages) for stages in (1, 2)]
    found += [dataclasses.replace(default, strips=strips) for strips in (1, 2, 4, 8, 16, 32)]
    found += [dataclasses.replace(default, backward_strips=strips) for strips in (1, 2, 4, 8, 16, 32)]
    found += [dataclasses.replace(default, warps=2, backward_warps=2), dataclasses.replace(default, chunk=16)]
    found += [dataclasses.replace(default, depth=min(depth, inputs["B"].shape[-1])) for depth in (16, 32, 64, 128)]
    if inputs["B"].shape[-1] == 128 and inputs["x"].dtype == jnp.bfloat16:
        found = [default, dataclasses.replace(default, depth=32, stages=1, apart=None), *cuts_apart(default), *found]
    return list(dict.fromkeys(found))


def cuts_apart(default: Tiles) -> list[Tiles]:
    """For N = 128, P = 64 in bfloat16: three-kernel cuts of the backward pass, which spill at most 20 bytes a thread.

    Around the fastest of `results/ssd_tune_lm_2k-nvidia-h200.json`; the one gradient kernel spills 1,608 bytes.
    """
    found = []
    for depth, stages, apart in (
        (128, 2, Apart(depth=64)),
        (128, 1, Apart(depth=64)),
        (64, 2, Apart(depth=64)),
        (128, 2, Apart(depth=128, warps=8)),
        (128, 2, Apart(depth=64, parts=2)),
    ):
        cut = dataclasses.replace(default, depth=depth, stages=stages, apart=apart)
        for strips in (default.strips, 1):
            for backward in (1, 2, default.strips):
                found.append(dataclasses.replace(cut, strips=strips, backward_strips=backward))
    return found


def draw(path: pathlib.Path) -> pathlib.Path:
    """The sweep of a result file as a picture beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in json.loads(path.read_text())["rows"] if row["name"] == "sweep"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, key in zip(axes, ("forward_ms", "forward_backward_ms")):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = [(row["T"], row[key]) for row in rows if row["implementation"] == name]
            axis.loglog(*zip(*points), marker=".", label=name)
        axis.set(title=key.removesuffix("_ms").replace("_", " + "), xlabel="T, steps")
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set(ylabel="milliseconds")
    axes[0].legend()
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=120)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=[*CASES, *TINY], default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="T of the sweep; none: no sweep")
    parser.add_argument("--links", type=int, default=None, help="calls in one compiled function")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--strips", action="store_true", help="with --tune: nothing but the number of strips")
    parser.add_argument("--picture", type=pathlib.Path, default=None)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    cases = {name: (CASES | TINY)[name] for name in arguments.cases}
    if arguments.picture is not None:
        print(draw(arguments.picture))
    elif arguments.check:
        names = arguments.cases if set(arguments.cases) != set(CASES) else None
        raise SystemExit(ssd_check.check(arguments.out, names, arguments.dtypes))
    elif arguments.accuracy:
        common.write_rows("ssd_accuracy", ssd_check.accuracy_rows(), arguments.out)
    elif arguments.tune:
        name, ways = ("ssd_tune_strips", strips) if arguments.strips else ("ssd_tune", all_cuts)
        common.write_rows(name, tune_rows(cases, arguments.dtypes, ways), arguments.out)
    else:
        for dtype in arguments.dtypes if cases else []:
            name = "ssd" if dtype == "bfloat16" else f"ssd_{dtype}"
            common.write_rows(name, case_rows(cases, dtype, arguments.links), arguments.out)
        if arguments.lengths:
            shape = TINY["tiny"] if cases and set(cases) <= set(TINY) else CASES["drama_8k"]
            common.write_rows("ssd_lengths", sweep_rows(shape, arguments.lengths), arguments.out)


if __name__ == "__main__":
    main()
