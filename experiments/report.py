"""Results of full runs: the tables made of them, and their learning curves.

    python -m experiments.report --add runs/Pong/xs/seed0-...   # puts the run's result into experiments/results
    python -m experiments.report                                # tables and pictures from what is there

See `run_results` for what is taken from a run. Of one that was cut short, `--evaluation` names a file written by
`experiments.evaluate`. Needs matplotlib (in the extra `drama_jax[test]`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from drama_jax.config import PRESETS, ConfigError, preset
from drama_jax.training import config_file, scores
from experiments import figures, run_results
from experiments.command_line import parse_plain
from experiments.run_results import Result
from experiments.tables import BESIDE, REFERENCES, markdown_table, mean_and_error, score

_PROGRAM = "python -m experiments.report"
ROOT = pathlib.Path(__file__).parents[1]


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
            print(run_results.add(options.add, options.evaluation))
        elif options.evaluation is not None:
            raise ConfigError(f"--evaluation {options.evaluation}: belongs to a run; name it with --add")
        found = run_results.load()
        readme = ROOT / "README.md"
        renewed = in_readme(readme.read_text(encoding="utf-8"), found)
        run_results.write(run_results.DIRECTORY / "README.md", all_columns(found))
        run_results.write(readme, renewed)
        figures.curves(found, ROOT / "docs" / "curves.png")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def all_columns(found: Sequence[Result]) -> str:
    """experiments/results/README.md: every run, and every verified published column."""
    names = [name for name in next(iter(scores.table().values())) if name not in REFERENCES]
    names = list(dict.fromkeys([name for row in scores.table().values() for name in row] + names))
    published = [name for name in names if name not in REFERENCES]
    head = ["game", "random", "human", "this project", *published]
    body = []
    for result in found:
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
        runs(found),
        "## Beside all published columns",
        markdown_table(head, body),
    )
    return "\n\n".join(sections) + "\n"


def in_readme(readme: str, found: Sequence[Result]) -> str:
    """The README with its two tables renewed; each stands between two comments that name it."""
    for name, table in {"scores": _scores_table(found), "runs": runs(found)}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if readme.count(start) != 1 or readme.count(end) != 1:
            raise ConfigError(f"README.md needs the comments {start.strip()} and {end} once each, around the table")
        before, rest = readme.split(start)
        readme = f"{before}{start}{table}\n{end}{rest.split(end)[1]}"
    return readme


def _scores_table(found: Sequence[Result]) -> str:
    head = ["game", "random", "human", *BESIDE.values(), "this project", "human-normalised"]
    body = []
    for result in found:
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


def runs(found: Sequence[Result]) -> str:
    """How each run went: steps, time, and the returns in training beside those of the evaluation."""
    head = ["run", "steps", "training, last 10,000 steps", "evaluation", "episodes", "ms per step", "minutes", "card"]
    body = [
        [
            ", ".join([f"{result['game']} {result['preset']} seed {result['seed']}", *changed(result)]),
            f"{result['steps']:,}" + ("" if result["complete"] else " (cut short)"),
            score(result["last_training_mean"]),
            mean_and_error(result["evaluation_returns"]),
            str(len(result["evaluation_returns"])),
            f"{result['ms_per_step']:.1f}",
            f"{result['wall_clock_s'] / 60:.1f}",
            result["device"],
        ]
        for result in found
    ]
    return markdown_table(head, body)


def _name(result: Result) -> str:
    plain = result["preset"] == "xs" and result["seed"] == 0
    name = result["game"] if plain else f"{result['game']} ({result['preset']}, seed {result['seed']})"
    notes = [*changed(result), *([] if result["complete"] else [f"cut at {result['steps']:,} steps"])]
    return ", ".join([name, *notes])


def changed(result: Result) -> list[str]:
    """The agent's settings in which a run differs from what its preset is today, each as `field value`."""
    if result["preset"] not in PRESETS:
        return []
    today = config_file.flat({"agent": dataclasses.asdict(preset(result["preset"]).agent)})
    then = config_file.LATER | config_file.flat({"agent": result["config"]["agent"]})
    return [f"`{path.rpartition('/')[2]}` {then[path]}" for path, value in today.items() if then[path] != value]


def _mean(result: Result) -> float | None:
    return float(np.mean(result["evaluation_returns"])) if result["evaluation_returns"] else None


if __name__ == "__main__":
    sys.exit(main())
