"""Which kernels one environment step launches, how often, and for how long.

    python -m benchmarks.profile_step --preset xs

Prints a table of kernels by total time, and writes it as JSON with the number of launches per step.
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


def kernel_rows(trace: pathlib.Path, steps: int) -> list[dict[str, Any]]:
    """One row per kernel name of the device planes of a profile, longest first; times are per step."""
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    (path,) = trace.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if "/device:" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                stats = dict(event.stats)
                scope = str(stats.get("name", stats.get("tf_op", "")))
                key = f"{event.name} @ {scope}" if scope else event.name
                totals[key][0] += event.duration_ns / 1e6 / steps
                totals[key][1] += 1 / steps
    rows = [{"kernel": name, "ms": ms, "launches": launches} for name, (ms, launches) in totals.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=70)
    parser.add_argument("--stored", type=int, default=20_000)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    config = preset(arguments.preset).agent
    state = update_step.filled_state(config, min(arguments.stored, config.replay.capacity))
    update = update_step.stages(state)["environment_step"]
    for _ in range(3):
        state, metrics = update(state)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(arguments.steps):
                state, metrics = update(state)
            jax.block_until_ready(metrics)
        rows = kernel_rows(pathlib.Path(folder), arguments.steps)
    total, launches = sum(row["ms"] for row in rows), sum(row["launches"] for row in rows)
    print(f"{total:.2f} ms of kernels, {launches:.0f} launches per step")
    for row in rows[: arguments.top]:
        name = re.sub(r"\s+", " ", row["kernel"])
        print(f"{row['ms']:8.3f} ms {row['launches']:6.1f} x  {name[:170]}")
    summary = {"name": "profile", "preset": arguments.preset, "kernel_ms": total, "launches": launches}
    common.write_result("profile_step", [summary, *rows[: arguments.top]], arguments.out)


if __name__ == "__main__":
    main()
