"""Results of full runs: one file per run, the tables made of them, and their learning curves.

    python -m experiments.report --add runs/Pong/xs/seed0-...   # puts the run's result into experiments/results
    python -m experiments.report                                # tables and pictures from what is there

A result is taken from a run's own files: config.json, metrics.jsonl, and scores.json of a run that was trained and
evaluated to its end. Of a run that was cut short, the step it reached is the result's `steps`, and `--evaluation` names
a file written by `experiments.evaluate`. Needs matplotlib (in the extra `drama_jax[test]`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drama_jax.config import ConfigError
from drama_jax.training import files, scores
from experiments import figures
from experiments.command_line import parse_plain
from experiments.tables import BESIDE, REFERENCES, markdown_table, mean_and_error, score

_PROGRAM = "python -m experiments.report"
ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
LAST = 10_000
"""Agent steps at the end of a run whose training episodes are averaged."""
Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do."""

    add: pathlib.Path | None = None
    """A run directory whose result is put into experiments/results first."""
    evaluation: pathlib.Path | None = None
    """A file written by `experiments.evaluate`, if the run has no evaluation of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes results, tables and pictures; returns the exit code: 0, or 2 after a mistake of the user."""
    try:
        options = parse_plain(Options, arguments, _PROGRAM, __doc__)
        if options.add is not None:
            print(add(options.add, options.evaluation))
        elif options.evaluation is not None:
            raise ConfigError(f"--evaluation {options.evaluation}: belongs to a run; name it with --add")
        results = load()
        (RESULTS / "README.md").write_text(all_columns(results), encoding="utf-8")
        readme = ROOT / "README.md"
        readme.write_text(in_readme(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
        figures.curves(results, ROOT / "docs" / "curves.png")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add(run: pathlib.Path, evaluation: pathlib.Path | None = None) -> pathlib.Path:
    """Writes a run's result to experiments/results; returns the file.

    Raises:
      ConfigError: if `run` is no run directory, or one of its files cannot be read.
    """
    result = collect(run, evaluation)
    path = RESULTS / f"{result['game']}-{result['preset']}-seed{result['seed']}.json"
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    files.write(path, f"{{\n{lines}\n}}\n".encode())
    return path


def collect(run: pathlib.Path, evaluation: pathlib.Path | None = None) -> dict[str, Any]:
    """A run's result, from its files; see `add`."""
    described = _read_json(run / "config.json")
    lines = [json.loads(line) for line in _read_text(run / "metrics.jsonl").splitlines()]
    speeds = [(line["step"], line["charts/SPS"]) for line in lines if line.get("charts/SPS")]
    if not speeds:
        raise ConfigError(f"{run / 'metrics.jsonl'}: no step was logged")
    finished = _read_json(run / "scores.json") if (run / "scores.json").exists() else None
    evaluated = _read_json(evaluation) if evaluation is not None else finished
    steps = np.asarray([step for step, _ in speeds])
    seconds = np.diff(steps, prepend=0) / np.asarray([speed for _, speed in speeds])
    rows = {line["step"]: line for line in lines if "world_model/total_loss" in line}
    played = [(line["step"], line["charts/episodic_return"]) for line in lines if "charts/episodic_return" in line]
    asked = described["config"]["steps"]
    return {
        "game": described["game"],
        "preset": described["preset"],
        "seed": described["config"]["seed"],
        "steps": int(steps[-1]),
        "complete": int(steps[-1]) == asked,
        "training_returns": played,
        "last_training_mean": last_mean(played, int(steps[-1])),
        "evaluation_returns": evaluated["evaluation_returns"] if evaluated else [],
        "evaluation_device": evaluated["device"] if evaluated else None,
        "device": described["device"],
        "wall_clock_s": float(np.sum(seconds)) if finished is None else finished["training_s"],
        "ms_per_step": float(np.median(1e3 * seconds / np.diff(steps, prepend=0))),
        "commit": described["commit"],
        "versions": {name: text for name, text in described["versions"].items() if name != "platform"},
        "curves": _curves(rows),
        "config": described["config"],
    }


def last_mean(played: Sequence[tuple[int, float]], steps: int) -> float | None:
    """Mean return of the training episodes that ended in the last `LAST` of `steps` agent steps; None without any."""
    last = [value for step, value in played if step > steps - LAST]
    return float(np.mean(last)) if last else None


def _curves(rows: Mapping[int, Mapping[str, float | None]], points: int = 200) -> dict[str, list[float | None]]:
    """Logged scalars thinned to about `points` steps, four digits each: enough to see what went wrong in a run."""
    steps = sorted(rows)[:: max(1, math.ceil(len(rows) / points))]
    tags = [tag for tag in rows[steps[0]] if tag != "step"] if steps else []
    curves: dict[str, list[float | None]] = {"step": [float(step) for step in steps]}
    for tag in tags:
        values = (rows[step].get(tag) for step in steps)
        curves[tag] = [None if value is None else float(f"{value:.4g}") for value in values]
    return curves


def load() -> list[dict[str, Any]]:
    """The results in experiments/results, in the order of their names."""
    return [_read_json(path) for path in sorted(RESULTS.glob("*.json"))]


def all_columns(results: Sequence[Result]) -> str:
    """experiments/results/README.md: every run, and every verified published column."""
    names = [name for name in next(iter(scores.table().values())) if name not in REFERENCES]
    names = list(dict.fromkeys([name for row in scores.table().values() for name in row] + names))
    published = [name for name in names if name not in REFERENCES]
    head = ["game", "random", "human", "this project", *published]
    body = []
    for result in results:
        row = scores.table().get(result["game"], {})
        cells = [score(row.get(name)) for name in REFERENCES]
        body.append(
            [
                _name(result),
                *cells,
                mean_and_error(result["evaluation_returns"]),
                *(score(row.get(name)) for name in published),
            ]
        )
    text = "Written by `python -m experiments.report`. Sources and protocols: `drama_jax/training/data/SOURCES.md`."
    sections = (
        "# Full runs",
        text,
        "## Runs",
        runs(results),
        "## Beside all published columns",
        markdown_table(head, body),
    )
    return "\n\n".join(sections) + "\n"


def in_readme(readme: str, results: Sequence[Result]) -> str:
    """The README with its two tables renewed; each stands between two comments that name it."""
    for name, table in {"scores": _scores_table(results), "runs": runs(results)}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if readme.count(start) != 1 or readme.count(end) != 1:
            raise ConfigError(f"README.md needs the comments {start.strip()} and {end} once each, around the table")
        before, rest = readme.split(start)
        readme = f"{before}{start}{table}\n{end}{rest.split(end)[1]}"
    return readme


def _scores_table(results: Sequence[Result]) -> str:
    head = ["game", "random", "human", *BESIDE.values(), "this project", "human-normalised"]
    body = []
    for result in results:
        row = scores.table().get(result["game"], {})
        mean = _mean(result)
        normalised = None if mean is None else scores.human_normalised(result["game"], mean)
        cells = [score(row.get(name)) for name in (*REFERENCES, *BESIDE)]
        body.append(
            [
                _name(result),
                *cells,
                mean_and_error(result["evaluation_returns"]),
                "" if normalised is None else f"{normalised:.2f}",
            ]
        )
    return markdown_table(head, body)


def runs(results: Sequence[Result]) -> str:
    """How each run went: steps, time, and the returns in training beside those of the evaluation."""
    head = ["run", "steps", "training, last 10,000 steps", "evaluation", "episodes", "ms per step", "minutes", "card"]
    body = [
        [
            f"{result['game']} {result['preset']} seed {result['seed']}",
            f"{result['steps']:,}" + ("" if result["complete"] else " (cut short)"),
            score(result["last_training_mean"]),
            mean_and_error(result["evaluation_returns"]),
            str(len(result["evaluation_returns"])),
            f"{result['ms_per_step']:.1f}",
            f"{result['wall_clock_s'] / 60:.1f}",
            result["device"],
        ]
        for result in results
    ]
    return markdown_table(head, body)


def _name(result: Result) -> str:
    plain = result["preset"] == "xs" and result["seed"] == 0
    name = result["game"] if plain else f"{result['game']} ({result['preset']}, seed {result['seed']})"
    return name if result["complete"] else f"{name}, cut at {result['steps']:,} steps"


def _mean(result: Result) -> float | None:
    return float(np.mean(result["evaluation_returns"])) if result["evaluation_returns"] else None


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(_read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    return content


if __name__ == "__main__":
    sys.exit(main())
