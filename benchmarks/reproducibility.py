"""How far two runs of a seed are apart, what `--deterministic` costs, and whether runs move between devices.

    python -m benchmarks.reproducibility --preset xs --game Breakout

Starts `python -m experiments.atari100k` in processes of their own: twice in one go, and once in two parts, each with
and without `--deterministic`. Rows say how far the weights of two runs are apart after the same number of updates (the
norm of the difference over the norm), and in how many lines of the log their losses are the same. On a GPU, two more
runs change the device half-way.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import common
from drama_jax.config import PRESETS, preset
from drama_jax.training import arrays, checkpoint

EVERY = 10
"""Steps between two lines of metrics."""


class Runs:
    """Starts runs below one directory and waits for them."""

    def __init__(self, folder: pathlib.Path, flags: list[str]) -> None:
        self.folder, self.flags = folder, flags

    def start(self, name: str, steps: int, *flags: str, platform: str | None = None) -> subprocess.Popen[bytes]:
        """The run called `name`, or its continuation, up to `steps`."""
        command = [sys.executable, "-m", "experiments.atari100k", "--logdir", str(self.folder / name)]
        command += ["--steps", str(steps), *self.flags, *flags]
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        if platform is not None:
            environment["JAX_PLATFORMS"] = platform
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def finish(self, *processes: subprocess.Popen[bytes]) -> None:
        """Waits; a run that failed ends this program with the end of its output."""
        for process in processes:
            if process.wait() != 0:
                logs = {path.name: path.read_text()[-1500:] for path in self.folder.glob("*.log")}
                raise SystemExit(f"{process.args!r} failed: {json.dumps(logs, indent=1)}")

    def stop(self, name: str, process: subprocess.Popen[bytes], step: int) -> None:
        """Stops a run by a signal, as a scheduler would, once it has logged `step`."""
        while process.poll() is None:
            logged = [path.read_text().splitlines() for path in (self.folder / name).glob("*/*/*/metrics.jsonl")]
            if any(lines and json.loads(lines[-1])["step"] >= step for lines in logged):
                process.terminate()
                break
            time.sleep(0.05)
        self.finish(process)

    def directory(self, name: str) -> pathlib.Path:
        """The directory of the run called `name`."""
        (path,) = (self.folder / name).glob("*/*/*")
        return path


def distance(first: pathlib.Path, second: pathlib.Path) -> float:
    """Norm of the difference of two runs' weights over the norm of the first's."""
    one, other = (arrays.flatten(checkpoint.load_weights(run)) for run in (first, second))
    apart = sum(float(np.sum(np.square(np.float64(one[name]) - other[name]))) for name in one)
    size = sum(float(np.sum(np.square(np.float64(one[name])))) for name in one)
    return float(np.sqrt(apart / size))


def losses(run: pathlib.Path) -> dict[int, float]:
    """Step -> mean total loss of the world model since the line before."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["world_model/total_loss"] for line in lines if "world_model/total_loss" in line}


def compared(name: str, runs: Runs, first: str, second: str) -> dict[str, Any]:
    """The row of two runs."""
    directories = runs.directory(first), runs.directory(second)
    one, other = map(losses, directories)
    relative = [abs(one[step] / other[step] - 1) for step in one]
    return {
        "name": name,
        "weights_apart": distance(*directories),
        "losses_equal": sum(value == 0 for value in relative),
        "losses": len(relative),
        "losses_apart_max": max(relative),
        "losses_apart_last": relative[-1],
    }


def ms_per_step(run: pathlib.Path) -> float:
    """Median over the lines of metrics.jsonl, the first ones, which compile, left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["charts/SPS"] for line in lines if "world_model/total_loss" in line and "charts/SPS" in line]
    return 1e3 / float(np.median(speeds[2:]))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="xs")
    parser.add_argument("--game", default="Breakout")
    parser.add_argument("--backend", choices=("envpool", "ale"), default="ale")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--out", type=pathlib.Path)
    options, flags = parser.parse_known_args()
    import jax

    # The runs share the device with this process, which only names it.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    warmup = preset(options.preset).agent.warmup_steps
    half, steps = warmup + options.updates // 2, warmup + options.updates
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(
            pathlib.Path(folder),
            f"--game {options.game} --preset {options.preset} --env-backend {options.backend} --eval-episodes 0 "
            f"--logging.no-progress --logging.no-tensorboard --logging.metrics-every {EVERY} "
            f"--compilation-cache {pathlib.Path(folder) / 'compiled'}".split()
            + flags,
        )
        exact = ("--deterministic",)
        # Alone, for the time a step takes.
        runs.finish(runs.start("one", steps))
        runs.finish(runs.start("one-exact", steps, *exact))
        rest = [runs.start("two", steps), runs.start("two-exact", steps, *exact)]
        halves = {"parts": runs.start("parts", steps), "parts-exact": runs.start("parts-exact", steps, *exact)}
        for name, process in halves.items():
            runs.stop(name, process, half)
        rest += [runs.start("parts", steps), runs.start("parts-exact", steps, *exact)]
        runs.finish(*rest)
        rows: list[dict[str, Any]] = [
            compared("two runs", runs, "one", "two"),
            compared("one run in two parts", runs, "one", "parts"),
            compared("two runs, --deterministic", runs, "one-exact", "two-exact"),
            compared("one run in two parts, --deterministic", runs, "one-exact", "parts-exact"),
        ]
        for name, run in (("step", "one"), ("step, --deterministic", "one-exact")):
            rows.append({"name": name, "ms": ms_per_step(runs.directory(run))})
        if jax.default_backend() != "cpu":
            rows += devices_changed(runs, warmup, steps)
    common.write_result(f"reproducibility-{options.preset}", rows, options.out)


def devices_changed(runs: Runs, warmup: int, steps: int) -> list[dict[str, Any]]:
    """Continues a run of this device on the CPU for an update, and one begun on the CPU here."""
    moved = [runs.start("parts", steps + 1, platform="cpu"), runs.start("from-cpu", warmup - 5, platform="cpu")]
    runs.finish(*moved)
    runs.finish(runs.start("from-cpu", warmup + 5))
    return [
        {"name": f"moved {way}", "updates_after": updates, "loss": list(losses(runs.directory(run)).values())[-1]}
        for way, run, updates in (("to the CPU", "parts", 1), ("from the CPU", "from-cpu", 5))
    ]


if __name__ == "__main__":
    main()
