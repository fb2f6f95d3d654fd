"""Which kernels one environment step launches, how often, and for how long.

    python -m benchmarks.profile_step --preset xs

Prints kernels by total time and time by part of the program, and writes both as JSON with the launches per step.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import tempfile
from typing import Any

import jax

from benchmarks import common, update_step
from drama_jax.config import PRESETS, preset
from experiments import machine

PARTS = {
    # First match wins; the patterns are parts of jax's operation names, that is, of modules and named scopes, or,
    # behind them, of kernels' names: those of our own kernels and of cuBLAS come without an operation.
    "imagination: encoder": r"imagination/Encoder|imagination/Dense|conv3x3_silu",
    "world model: our convolution kernels": r"conv3x3_|first_layer_gradient",
    "sampler": r"sampler",
    "gathering windows": r"gather/",
    "imagination: actor": r"imagination/.*MLP| actor(__\d+)?$",
    "imagination: backbone": r"imagination/.*Mamba2Backbone| (project|stem|mixer_\w+)$",
    "imagination: samples and heads": r"imagination/| sample_latent\w*$",
    "behaviour: optimiser and slow critic": r"behaviour/optimizer",
    "behaviour: losses and networks": r"behaviour/",
    "world model: optimiser": r"optimizer",
    "world model: encoder backward": r"transpose\(jvp\(Encoder",
    "world model: encoder forward": r"jvp\(Encoder\)",
    "world model: decoder backward": r"transpose\(jvp\(Decoder",
    "world model: decoder forward": r"jvp\(Decoder\)",
    "world model: backbone backward": r"transpose\(jvp\(Mamba2Backbone",
    "world model: backbone forward": r"jvp\(Mamba2Backbone\)",
    "world model: losses and heads": r"jvp\(",
    "world model: scan": r" ssd_\w+$",
    "matrix products anywhere": r" nvjet| .*cublas",
}


def operation_names(compiled: Any) -> dict[str, str]:
    """Kernel name -> jax operation name, from the compiled program's metadata."""
    pattern = re.compile(r'%?([\w.\-]+) = .*?metadata=\{[^}]*op_name="([^"]*)"')
    return {name.replace(".", "_").replace("-", "_"): op for name, op in pattern.findall(compiled.as_text())}


def operation_of(kernel: str, stats: dict[str, str], operations: dict[str, str]) -> str:
    """The jax operation behind a kernel: kernels carry the compiler's name, library calls carry it in their stats."""
    candidates = (kernel, stats.get("hlo_op", ""))
    found = (operations[name.replace(".", "_")] for name in candidates if name.replace(".", "_") in operations)
    return next(found, stats.get("name", ""))


def kernel_rows(trace: pathlib.Path, steps: int, operations: dict[str, str]) -> list[dict[str, Any]]:
    """One row per kernel of the device's streams, longest first; times are per step."""
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    (path,) = trace.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if "/device:" not in plane.name:
            continue
        for line in (line for line in plane.lines if "Stream" in line.name):
            for event in line.events:
                stats = {key: str(value) for key, value in event.stats}
                operation = operation_of(event.name, stats, operations)
                total = totals[event.name, operation]
                total[0] += event.duration_ns / 1e6 / steps
                total[1] += 1 / steps
    rows = [
        {"name": name, "operation": operation, "ms": round(ms, 4), "launches": round(launches, 2)}
        for (name, operation), (ms, launches) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def part_rows(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels grouped by `PARTS`, longest first."""
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for row in kernels:
        text = f"{row['operation']} {row['name']}"
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, text)), "everything else")
        totals[part][0] += row["ms"]
        totals[part][1] += row["launches"]
    rows = [{"part": part, "ms": ms, "launches": launches} for part, (ms, launches) in totals.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=25, help="kernels printed")
    parser.add_argument("--stored", type=int, default=20_000)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    machine.set_xla_flags(deterministic=False)  # as a run does
    config = preset(arguments.preset).agent
    state = update_step.filled_state(config, min(arguments.stored, config.replay.capacity))
    update = update_step.stages(state)["environment_step"].lower(state).compile()
    for _ in range(3):
        state, metrics = update(state)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(arguments.steps):
                state, metrics = update(state)
            jax.block_until_ready(metrics)
        kernels = kernel_rows(pathlib.Path(folder), arguments.steps, operation_names(update))
    parts = part_rows(kernels)
    total, launches = sum(row["ms"] for row in kernels), sum(row["launches"] for row in kernels)
    print(f"{total:.2f} ms of kernels, {launches:.0f} launches per step")
    for row in parts:
        print(f"{row['ms']:8.3f} ms {row['launches']:7.1f} x  {row['part']}")
    for row in kernels[: arguments.top]:
        print(f"{row['ms']:8.3f} ms {row['launches']:7.1f} x  {row['name'][:60]}  {row['operation'][-90:]}")
    summary = {"name": "profile", "preset": arguments.preset, "kernel_ms": total, "launches": launches}
    common.write_result("profile_step", [summary, *parts, *kernels], arguments.out, show=False)


if __name__ == "__main__":
    main()
