"""What every benchmark shares: timing, the description of the machine, and the result file."""

from __future__ import annotations

import datetime
import json
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"

# Ceilings that floors are stated against, measured with plain copies and an 8192^3 matrix product.
CEILINGS = {
    "NVIDIA H100 80GB HBM3": {"bytes_per_s": 3.0e12, "bf16_flop_per_s": 790e12},
    "NVIDIA H200": {"bytes_per_s": 4.3e12, "bf16_flop_per_s": 790e12},
}


def device_name() -> str:
    """Name of the first device, as jax reports it."""
    return str(jax.devices()[0].device_kind)


def device_slug() -> str:
    """The device's name in file names."""
    return device_name().lower().replace(" ", "-")


def median_ms(function: Callable[[], Any], repeats: int = 30, warmup: int = 3) -> float:
    """Median wall-clock milliseconds of `function`, which must return arrays; waits for the device every time."""
    for _ in range(warmup):
        jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def queued_ms(function: Callable[[], Any], repeats: int = 50, warmup: int = 3) -> float:
    """Mean milliseconds of `function` when calls are queued without waiting: what the device needs, dispatch hidden."""
    for _ in range(warmup):
        jax.block_until_ready(function())
    start = time.perf_counter()
    for _ in range(repeats):
        out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) * 1e3 / repeats


def commit() -> str:
    """Short hash of the checked-out commit, `unknown` outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def write_result(
    benchmark: str, rows: list[dict[str, Any]], directory: pathlib.Path | None = None, *, show: bool = True
) -> dict[str, Any]:
    """Writes `<benchmark>-<device>.json` to `directory` (default benchmarks/results), and prints it if `show`."""
    result = {
        "benchmark": benchmark,
        "device": device_name(),
        "jax": jax.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    directory = directory or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{benchmark}-{device_slug()}.json").write_text(json.dumps(result, indent=1) + "\n")
    if show:
        print(json.dumps(result, indent=1))
    return result


def write_rows(benchmark: str, rows: Iterable[dict[str, Any]], directory: pathlib.Path | None) -> None:
    """Prints each row when it is there and writes the file anew, so that a run that is cut short loses none."""
    kept = []
    for row in rows:
        print(json.dumps(row), flush=True)
        kept.append(row)
        write_result(benchmark, kept, directory, show=False)
