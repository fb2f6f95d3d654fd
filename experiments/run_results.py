"""Results of full runs: one file per run in experiments/results, taken from the run's own files.

Of a run that was cut short, the step it reached is the result's `steps`.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drama_jax.config import ConfigError
from drama_jax.training import files, metrics_file

DIRECTORY = pathlib.Path(__file__).parent / "results"
LAST = 10_000
"""Agent steps at the end of a run whose training episodes are averaged."""
Result = Mapping[str, Any]
Row = Mapping[str, Any]
"""A line of metrics.jsonl."""


def add(run: pathlib.Path, evaluation: pathlib.Path | None = None) -> pathlib.Path:
    """Writes a run's result to experiments/results; returns the file.

    Args:
      run: A run directory.
      evaluation: A file written by `experiments.evaluate`, if the run has no evaluation of its own.

    Raises:
      ConfigError: if `run` is no run directory, one of its files cannot be read, or the result cannot be written.
    """
    result = collect(run, evaluation)
    path = DIRECTORY / f"{result['game']}-{result['preset']}-seed{result['seed']}.json"
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    write(path, f"{{\n{lines}\n}}\n")
    return path


def collect(run: pathlib.Path, evaluation: pathlib.Path | None = None) -> dict[str, Any]:
    """A run's result, from its files; see `add`."""
    described = _read(run / "config.json", "game", "preset", "config", "device", "commit", "versions")
    asked = _checked(described["config"], f"{run / 'config.json'}: config", ("agent", "seed", "steps"))
    lines = metrics_file.read(run)
    own = run / "scores.json"
    finished = _read(own, "training_s", *_EVALUATED) if own.exists() else None
    evaluated = finished if evaluation is None else _read(evaluation, *_EVALUATED)
    played = [(line["step"], line["charts/episodic_return"]) for line in lines if "charts/episodic_return" in line]
    steps, seconds, ms_per_step = _pace(run, lines)
    return {
        "game": described["game"],
        "preset": described["preset"],
        "seed": asked["seed"],
        "steps": steps,
        "complete": steps == asked["steps"],
        "training_returns": played,
        "last_training_mean": last_mean(played, steps),
        "evaluation_returns": evaluated["evaluation_returns"] if evaluated else [],
        "evaluation_device": evaluated["device"] if evaluated else None,
        "device": described["device"],
        "wall_clock_s": seconds if finished is None else finished["training_s"],
        "ms_per_step": ms_per_step,
        "commit": described["commit"],
        "versions": {name: text for name, text in described["versions"].items() if name != "platform"},
        "curves": _curves({line["step"]: line for line in lines if "world_model/total_loss" in line}),
        "config": described["config"],
    }


_EVALUATED = ("evaluation_returns", "device")


def _pace(run: pathlib.Path, lines: Sequence[Row]) -> tuple[int, float, float]:
    """The last step, seconds of training, and the median over the lines of metrics of milliseconds per step."""
    timed = [line for line in lines if line.get("charts/SPS")]
    if not timed:
        raise ConfigError(f"{run / metrics_file.NAME}: no step was logged")
    steps = [line["step"] for line in timed]
    per_step = 1 / np.asarray([line["charts/SPS"] for line in timed])
    # Lines of older versions do not say when they were written.
    seconds = timed[-1].get("seconds", float(np.sum(np.diff(steps, prepend=0) * per_step)))
    return int(steps[-1]), seconds, float(np.median(1e3 * per_step))


def last_mean(played: Sequence[tuple[int, float]], steps: int) -> float | None:
    """Mean return of the training episodes that ended in the last `LAST` of `steps` agent steps; None without any."""
    last = [value for step, value in played if step > steps - LAST]
    return float(np.mean(last)) if last else None


def _curves(rows: Mapping[int, Row], points: int = 200) -> dict[str, list[float | None]]:
    """Logged scalars thinned to about `points` steps, four digits each: enough to see what went wrong in a run."""
    steps = sorted(rows)[:: max(1, math.ceil(len(rows) / points))]
    tags = [tag for tag in rows[steps[0]] if tag != "step"] if steps else []
    curves: dict[str, list[float | None]] = {"step": [float(step) for step in steps]}
    for tag in tags:
        values = (rows[step].get(tag) for step in steps)
        curves[tag] = [None if value is None else float(f"{value:.4g}") for value in values]
    return curves


def load() -> list[dict[str, Any]]:
    """The results in experiments/results, in the order of their names.

    Raises:
      ConfigError: if one cannot be read.
    """
    return [_read(path) for path in sorted(DIRECTORY.glob("*.json"))]


def write(path: pathlib.Path, text: str) -> None:
    """Writes a text file, in a directory that is made if need be, whole or not at all.

    Raises:
      ConfigError: if it cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        files.write(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def _read(path: pathlib.Path, *names: str) -> dict[str, Any]:
    """A file that holds a JSON object with at least these names.

    Raises:
      ConfigError: if it does not, or cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    return _checked(content, str(path), names)


def _checked(content: Any, where: str, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is no JSON object")
    missing = [name for name in names if name not in content]
    if missing:
        raise ConfigError(f"{where} has no {', '.join(missing)}; a run of atari100k or envpool is wanted")
    return content
