"""Writes the tables of benchmarks/README.md from the result files.

    python -m benchmarks.tables

Each table stands between two comments that name it. A test checks that the README is what this script makes of it. A
table without result files says that it has not been measured.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from benchmarks import common, multi_seed

README = pathlib.Path(__file__).parent / "README.md"
CARD = "nvidia-h100-80gb-hbm3"
OTHER_CARD = "nvidia-h200"
"""For what was not measured on the first."""
Rows = list[dict[str, Any]]
BARS = {"world_model_update": 8, "imagination_behaviour_update": 7, "act": 0.8, "environment_step": 15}
SSD_BARS = {"drama_train": (0.026, 0.139), "drama_1k": (0.096, 0.497), "drama_8k": (0.195, 0.958)}
"""Forward, forward and backward; bfloat16."""


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def stages(rows: Rows) -> str:
    """Stages of one step."""
    head = ["stage", "actions", "waiting for each, ms", "queued, ms", "floor, ms", "ratio", "bar, ms"]
    return table(
        head,
        [
            [
                row["name"],
                str(row.get("actions", 18)),
                number(row["median_ms"]),
                number(row["queued_ms"]),
                number(row.get("floor_ms")),
                number(row.get("ratio"), 1),
                f"{BARS[row['name']]:g}",
            ]
            for row in rows
        ],
    )


def profile(rows: Rows) -> str:
    """Parts of one step by kernel time."""
    (summary,) = (row for row in rows if row.get("name") == "profile")
    parts = [row for row in rows if "part" in row]
    body = [
        [row["part"], f"{row['launches']:.0f}", number(row["ms"]), f"{row['ms'] / summary['kernel_ms']:.0%}"]
        for row in parts
    ]
    total = ["all", f"{summary['launches']:.0f}", number(summary["kernel_ms"]), "100%"]
    return table(["part", "launches", "ms", "share"], [*body, total])


def implementations(rows: Rows) -> str:
    """Our kernels beside XLA's."""
    names = list(dict.fromkeys(row["name"] for row in rows if "implementation" in row))
    cells = {(row["name"], row["implementation"]): row for row in rows if "implementation" in row}
    body = [
        [
            name,
            number(cells[name, "xla"]["ms"]),
            number(cells[name, "pallas"]["ms"]),
            number(cells[name, "xla"]["floor_ms"]),
        ]
        for name in names
    ]
    return table(["layer", "XLA, ms", "ours, ms", "floor, ms"], body)


def parts(rows: Rows) -> str:
    """Parts of imagination."""
    body = [
        [row["name"], number(row["queued_ms"]), number(row["floor_ms"], 3), number(row["ratio"], 1)] for row in rows
    ]
    return table(["part", "queued, ms", "floor, ms", "ratio"], body)


def loops(*files: Rows) -> str:
    """The real loop, with a cold and a warm compilation cache."""
    head = [
        "compilation cache",
        "first updates after, s",
        "of it making programs, s",
        "step, ms",
        "steps/s",
        "emulator",
        "device memory, GB",
    ]
    body = [
        [
            row["name"].rpartition("_")[2],
            number(row["first_update_s"], 0),
            number(row.get("made_s"), 0),
            number(row["ms_per_step"], 1),
            number(row["steps_per_s"], 1),
            f"{row['emulator_share']:.0%}",
            number(row["peak_device_bytes"] / 1e9, 1),
        ]
        for (row,) in files
    ]
    return table(head, body)


def bands(rows: Rows) -> str:
    """Largest distance of smoothed loss curves from float32's."""
    losses = list(rows[0]["band"])
    body = [
        [row["name"], *(f"{row['band'][loss]:.2%}" for loss in losses)] for row in rows if any(row["band"].values())
    ]
    return table(["run", *losses], body)


def checkpoints(rows: Rows) -> str:
    """Seconds and bytes of a save against the step."""
    head = ["step", "the loop waits, s", "written after, s", "state, MB", "replay, MB"]
    return table(
        head,
        [
            [
                f"{row['step']:,}",
                number(row["blocking_s"], 3),
                number(row["until_saved_s"]),
                number(row["state_bytes"] / 1e6, 1),
                number(row["replay_bytes"] / 1e6),
            ]
            for row in rows
            if "blocking_s" in row
        ],
    )


def reproducibility(rows: Rows) -> str:
    """How far apart runs of a seed are."""
    head = ["runs of one seed, 100 updates", "weights apart", "equal losses"]
    return table(
        head,
        [
            [row["name"], f"{row['weights_apart']:.2g}", f"{row['losses_equal']} of {row['losses']}"]
            for row in rows
            if "weights_apart" in row
        ],
    )


def scans(rows: Rows) -> str:
    """Times and memory of the SSD scan, by shape, dtype and implementation."""
    body = []
    for row in (row for row in rows if row["name"] not in ("sweep", "exponent")):
        bars = SSD_BARS.get(row["name"]) if row["dtype"] == "bfloat16" and row["implementation"] == "pallas" else None
        cells = [row["name"], row["dtype"], row["implementation"]]
        for direction, bar in zip(("forward", "forward_backward"), bars or (None, None)):
            cells += [number(row[f"{direction}_ms"], 3), number(bar, 3), number(row.get(f"{direction}_ratio"), 1)]
        body.append([*cells, number(row["peak_bytes"] / 1e6, 1)])
    head = ["shape", "dtype", "implementation", "forward, ms", "bar", "over floor"]
    return table([*head, "forward and backward, ms", "bar", "over floor", "memory, MB"], body)


def lengths(rows: Rows) -> str:
    """Milliseconds against T at fixed B, and the exponents fitted beyond 4,096 steps."""
    points = [row for row in rows if row["name"] == "sweep"]
    names = list(dict.fromkeys(row["implementation"] for row in points))
    cells = {(row["T"], row["implementation"]): row for row in points}
    keys = [(name, key) for name in names for key in ("forward_ms", "forward_backward_ms")]
    body = [
        [f"{steps:,}", *(number(cells.get((steps, name), {}).get(key), 3) for name, key in keys)]
        for steps in sorted({row["T"] for row in points})
    ]
    fits = {row["implementation"]: row for row in rows if row["name"] == "exponent"}
    if not points:
        return ""
    fitted = [number(fits.get(name, {}).get(key.replace("ms", "exponent"))) for name, key in keys]
    titles = {"forward_ms": "forward", "forward_backward_ms": "and backward"}
    return table(["T", *(f"{name}, {titles[key]}" for name, key in keys)], [*body, ["exponent", *fitted]])


def lowerings(rows: Rows) -> str:
    """Microseconds of the forward scan by Triton and by Mosaic, by shape."""
    cases, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "implementation"))
    cells = {(row["name"], row["implementation"]): 1e3 * row["forward_ms"] for row in rows if "forward_ms" in row}
    body = [[name, *(number(cells.get((case, name)), 1) for case in cases)] for name in names]
    return table(["forward, us", *cases], body)


def strips(rows: Rows) -> str:
    """The scan in strips: milliseconds forward, and both ways by the strips of the backward pass; first the default."""
    cuts = [re.findall(r"strips=(\d+), backward_strips=(\d+)", row["tiles"])[0] for row in rows]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row, (forward, backward) in zip(rows, cuts, strict=True):
        cells.setdefault((row["name"], forward), {})[backward] = row
    columns = sorted({backward for _, backward in cuts}, key=int)
    body = [
        [*case, *(number(by[one]["forward_backward_ms"] if one in by else None, 3) for one in columns)]
        for (name, count), by in cells.items()
        for case in [(name, count, number(min(row["forward_ms"] for row in by.values()), 3))]
    ]
    return table(["shape", "strips", "forward, ms", *(f"both, backward in {one}" for one in columns)], body)


def seeds(*files: Rows) -> str:
    """Many seeds in one program, of every preset that was measured, and what bars they answer."""
    head = ["preset", "seeds", "step of all, ms", "times one seed's", "bar", "steps/s, all seeds", "GB", "bar"]
    body = []
    for row in (row for rows in files for row in rows):
        case = row["preset"], row["seeds"]
        at_most, fits = multi_seed.RATIO_BARS.get(case), multi_seed.MEMORY_BARS.get(case)
        cells = [row["preset"], str(row["seeds"]), number(row["queued_ms"]), number(row["ratio"]), number(at_most, 1)]
        size, most = (row["peak_bytes"] or row["compiled_bytes"]) / 1e9, None if fits is None else fits / 1e9
        body.append([*cells, number(row["steps_per_s"], 1), number(size, 1), number(most, 0)])
    return table(head, body)


def devices(rows: Rows) -> str:
    """As many seeds on each of several devices as on one."""
    times = {row["name"]: value for row, value in multi_seed.speedups(rows)}
    body = [
        [
            str(row["devices"]),
            str(row["seeds"]),
            number(row["queued_ms"]),
            number(row["steps_per_s"], 1),
            number(times.get(row["name"])),
            number(multi_seed.DEVICES_BAR if row["devices"] == 2 else None, 1),
        ]
        for row in rows
    ]
    return table(["devices", "seeds", "step of all, ms", "steps/s, all seeds", "times one device's", "bar"], body)


def on_device(*files: Rows) -> str:
    """Whole runs on the device, of every kind of device that was measured."""
    head = ["environment", "preset", "seeds", "on", "step of all, ms", "steps/s, all seeds", "first chunk, s"]
    body = []
    for row in (row for rows in files for row in rows):
        device = f"{row['cores']} cores, {row['cpu']}" if row["steps_per_cpu_s"] is not None else CARD
        cells = [row["env"], row["preset"], str(row["seeds"]), device, number(row["ms_per_step"], 1)]
        body.append([*cells, number(row["steps_per_s"], 0), number(row["first_chunk_s"], 0)])
    return table(head, body)


TABLES: dict[str, tuple[Callable[..., str], list[str]]] = {
    "update_step": (stages, [f"update_step-{CARD}"]),
    "profile_step": (profile, [f"profile_step-{CARD}"]),
    "autoencoder": (implementations, [f"autoencoder-{CARD}"]),
    "imagination": (parts, [f"imagination-{CARD}"]),
    "ssd": (scans, [f"ssd-{CARD}"]),
    "ssd_float32": (scans, [f"ssd_float32-{CARD}"]),
    "ssd_lengths": (lengths, [f"ssd_lengths-{CARD}"]),
    "ssd_mosaic": (lowerings, [f"ssd_mosaic-{CARD}"]),
    "ssd_strips": (strips, [f"ssd_tune_strips-{CARD}"]),
    "train_loop": (loops, [f"train_loop_cold-xs-{CARD}", f"train_loop_warm-xs-{CARD}"]),
    "precision": (bands, [f"precision-{CARD}"]),
    "checkpoint": (checkpoints, ["checkpoint-cpu"]),
    "reproducibility": (reproducibility, [f"reproducibility-xs-{CARD}"]),
    "multi_seed": (seeds, [f"multi_seed-{preset}-{CARD}" for preset in multi_seed.SEEDS]),
    "multi_device": (devices, [f"multi_device-xs-{CARD}"]),
    "jax_env": (on_device, ["jax_env-cpu", f"jax_env-{CARD}"]),
}


def result_file(name: str) -> pathlib.Path | None:
    """Where the result of that name is, of either card; None if it was not measured."""
    paths = [common.RESULTS / f"{one}.json" for one in (name, name.replace(CARD, OTHER_CARD))]
    return next((path for path in paths if path.exists()), None)


def filled(name: str) -> str:
    """What stands between a table's comments."""
    function, files = TABLES[name]
    paths = [path for path in map(result_file, files) if path is not None]
    results = [json.loads(path.read_text()) for path in paths]
    made = function(*(result["rows"] for result in results)) if results else ""
    if made.count("\n") < 2:  # no rows
        return "Not measured yet."
    made_at = dict.fromkeys((result["commit"], result["device"]) for result in results)
    if len(made_at) > 1:
        return f"{made}\n\nMeasured at {', '.join(f'`{commit}` ({device})' for commit, device in made_at)}."
    ((commit, device),) = made_at
    card = f", {device}" if OTHER_CARD in paths[0].name else ""
    return f"{made}\n\nMeasured at `{commit}`{card}."


def rewritten(text: str) -> str:
    """The README with every table made anew."""
    for name in TABLES:
        body = f"<!-- {name} -->\n{filled(name)}\n<!-- end -->"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
        text = pattern.sub(body.replace("\\", r"\\"), text)
    return text


def main() -> None:
    """Rewrites the README in place."""
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    main()
