"""Writes the tables of benchmarks/README.md from the result files.

    python -m benchmarks.tables

Each table stands between two comments that name it. A test checks that the README is what this script makes of it.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from benchmarks import common

README = pathlib.Path(__file__).parent / "README.md"
CARD = "nvidia-h100-80gb-hbm3"
Rows = list[dict[str, Any]]
BARS = {"world_model_update": 8, "imagination_behaviour_update": 7, "act": 0.8, "environment_step": 15}


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def stages(rows: Rows) -> str:
    """Stages of one step."""
    head = ["stage", "waiting for each, ms", "queued, ms", "floor, ms", "ratio", "bar, ms"]
    return table(
        head,
        [
            [
                row["name"],
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
    head = ["compilation cache", "first updates after, s", "step, ms", "steps/s", "emulator", "device memory, GB"]
    body = [
        [
            row["name"].rpartition("_")[2],
            number(row["first_update_s"], 0),
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


TABLES: dict[str, tuple[Callable[..., str], list[str]]] = {
    "update_step": (stages, [f"update_step-{CARD}"]),
    "profile_step": (profile, [f"profile_step-{CARD}"]),
    "autoencoder": (implementations, [f"autoencoder-{CARD}"]),
    "imagination": (parts, [f"imagination-{CARD}"]),
    "train_loop": (loops, [f"train_loop_cold-xs-{CARD}", f"train_loop_warm-xs-{CARD}"]),
    "precision": (bands, [f"precision-{CARD}"]),
    "checkpoint": (checkpoints, ["checkpoint-cpu"]),
    "reproducibility": (reproducibility, [f"reproducibility-xs-{CARD}"]),
}


def rewritten(text: str) -> str:
    """The README with every table made anew."""
    for name, (function, files) in TABLES.items():
        results = [json.loads((common.RESULTS / f"{file}.json").read_text()) for file in files]
        made = function(*(result["rows"] for result in results))
        source = ", ".join(f"`{result['commit']}`" for result in results[:1])
        body = f"<!-- {name} -->\n{made}\n\nMeasured at {source}.\n<!-- end -->"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
        text = pattern.sub(body.replace("\\", r"\\"), text)
    return text


def main() -> None:
    """Rewrites the README in place."""
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    main()
