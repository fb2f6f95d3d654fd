"""What an ablation leaves: its data, two tables and a picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from drama_jax.config import ConfigError
from drama_jax.training import scores
from experiments import aggregate, figures
from experiments.ablation_runs import Result
from experiments.tables import markdown_table, standard_error

STRETCHES = 8
"""Equal parts of a run whose returns are in the second table."""


def read(base: pathlib.Path) -> list[Result]:
    """The results in BASE.json.

    Raises:
      ConfigError: if it is not there, or is not the data of an ablation.
    """
    path = base.with_suffix(".json")
    try:
        return [Result(**values) for values in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); run the ablation without --redraw") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the data of an ablation ({error}); run it without --redraw") from error


def write(base: pathlib.Path, results: Sequence[Result]) -> None:
    """Writes BASE.json.

    Raises:
      ConfigError: if it cannot be written.
    """
    try:
        data = {"what": base.name, "runs": [dataclasses.asdict(result) for result in results]}
        scores.write(base.with_suffix(".json"), data)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from error


def show(base: pathlib.Path, results: Sequence[Result]) -> str:
    """Writes tables and picture, BASE.md and .png; returns the tables.

    Raises:
      ConfigError: if they cannot be written.
    """
    text = f"{table(base.name, results)}\n\n{stretches(base.name, results)}"
    try:
        base.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        draw(results, base.with_suffix(".png"))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from error
    return text


def table(what: str, results: Sequence[Result]) -> str:
    """A row per environment and variant: final return with its interval, time a step, errors of the autoencoder."""
    objects = any(result.object_errors for result in results)
    memory = any(result.memory_bytes is not None for result in results)
    head = ["", what, "final return", "95 %", "ms per step", "parameters", "reconstruction loss"]
    head += (["memory, MB"] if memory else []) + (["error on objects", "elsewhere"] if objects else [])
    body = []
    for result in results:
        final = [value for value in result.final_returns if value is not None]
        row = [result.name.rpartition(":")[2], result.variant, f"{np.mean(final):.2f}" if final else ""]
        row += [interval(final), f"{result.ms_per_step:.1f}", f"{result.parameters:,}", f"{result.reconstruction:.3g}"]
        if memory:
            row.append("" if result.memory_bytes is None else f"{result.memory_bytes / 1e6:.1f}")
        if objects:
            row += [f"{np.mean([pair[part] for pair in result.object_errors]):.4f}" for part in (0, 1)]
        body.append(row)
    return markdown_table(head, body)


def interval(values: Sequence[float]) -> str:
    """The bootstrap interval of a mean; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    found: Mapping[str, aggregate.Estimate] = aggregate.estimate({"": list(values)})
    bounds = found["mean"].interval
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def stretches(what: str, results: Sequence[Result]) -> str:
    """A row per environment and variant, a column per stretch of steps: mean return ± standard error over the seeds.

    The environments' lines differ in what they were run for, so each has a table of its own.
    """
    tables = []
    for name in dict.fromkeys(result.name for result in results):
        rows = [result for result in results if result.name == name]
        ends = np.linspace(0, rows[0].steps, STRETCHES + 1)[1:]
        head = [f"{name.rpartition(':')[2]}, {what}", *(f"to {end:,.0f}" for end in ends)]
        tables.append(markdown_table(head, [[row.variant, *by_stretch(row)] for row in rows]))
    return "\n\n".join(["Return by steps, mean ± standard error over the seeds:", *tables])


def by_stretch(result: Result) -> list[str]:
    """Of each of `STRETCHES` equal parts of the run, the mean over its points of the curves; empty where none ended."""
    curves = np.asarray(result.curves, np.float64)  # [seeds, points], nan where no episode ended
    # The end of a stretch is its own point's; half a point, because the ends are rounded.
    part = np.ceil(np.arange(0.5, curves.shape[1]) / curves.shape[1] * STRETCHES).astype(int)
    cells = []
    for number in range(1, STRETCHES + 1):
        seeds = [float(row[np.isfinite(row)].mean()) for row in curves[:, part == number] if np.isfinite(row).any()]
        error = standard_error(seeds)
        cells.append(f"{np.mean(seeds):.2f}" + ("" if error is None else f" ± {error:.2f}") if seeds else "")
    return cells


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """A panel per environment, a curve per variant: the mean over its seeds, and their range."""
    places = list(dict.fromkeys(result.name for result in results))
    picture = figures.import_figure()(figsize=(4.6 * len(places), 3.4), layout="constrained")
    for axis, name in zip(np.atleast_1d(picture.subplots(1, len(places))), places):
        for result in (result for result in results if result.name == name):
            steps, curves = np.asarray(result.curve_steps), np.asarray(result.curves, np.float64)
            known = np.isfinite(curves).all(axis=0)
            (line,) = axis.plot(steps[known], curves[:, known].mean(axis=0), label=result.variant)
            low, high = curves[:, known].min(axis=0), curves[:, known].max(axis=0)
            axis.fill_between(steps[known], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(name.rpartition(":")[2])
        axis.set_xlabel("agent steps")
        axis.set_ylabel("return of an episode")
        axis.legend(fontsize=7)
    picture.savefig(path, dpi=110)
