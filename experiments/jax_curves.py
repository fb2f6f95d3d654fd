"""What the seeds of `experiments.jax_env` come to: a table of final returns, learning curves, and their data.

    python -m experiments.jax_curves --data experiments/results/jax_env/Catch-bsuite.json --picture docs/catch.png

measures random play anew, writes it into the data and draws them again; nothing is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax.config import ConfigError
from drama_jax.envs import jax_env
from drama_jax.envs.jax_env import JaxEnv
from drama_jax.training import metrics_file, scores
from drama_jax.training import random_play as random_episodes
from experiments import figures
from experiments.tables import markdown_table, standard_error

LAST = 10
"""The final return is the mean over the episodes that end in the last 1 / LAST of the steps."""
_POINTS = 40
"""Points of a curve: means over as many equal parts of the run."""
_RANDOM = 1_000_003
"""Folded into a seed's key for random play."""
_MOST_RANDOM = 10_000


def check(*paths: pathlib.Path | None) -> None:
    """Raises a ConfigError if the files cannot be written, or a picture not drawn; creates nothing."""
    for path in filter(None, paths):
        if not path.absolute().parent.is_dir() or path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise ConfigError(f"{path} cannot be written; name a file in a directory that is there")
        if path.suffix == ".png":
            figures.import_figure()


def episodes(directory: pathlib.Path) -> list[tuple[int, float]]:
    """(step at the end, return) of every episode of a run, from its metrics.jsonl."""
    tag = "charts/episodic_return"
    return [(line["step"], line[tag]) for line in metrics_file.read(directory) if tag in line]


def final_metrics(directories: Sequence[pathlib.Path], steps: int) -> dict[str, list[float]]:
    """By tag, for each run, the mean of what learning logged in the last 1 / LAST of the steps."""
    found: dict[str, list[float]] = {}
    for directory in directories:
        learnt = [line for line in metrics_file.read(directory) if "actor_critic/entropy" in line]
        late = [line for line in learnt if line["step"] > steps - steps / LAST]
        for tag in sorted(late[0]) if late else ():
            if tag.startswith(("actor_critic/", "world_model/")):
                found.setdefault(tag, []).append(float(f"{np.mean([line[tag] for line in late]):.4g}"))
    return found


def collect(directories: Sequence[pathlib.Path]) -> dict[str, Any]:
    """The curves of finished runs of one command, from their files.

    Returns:
      What the JSON file holds; `curves` has a row per seed, null where no episode ended.

    Raises:
      ConfigError: if a file cannot be read.
    """
    runs, configs = [], []
    for directory in directories:
        try:
            runs.append(json.loads((directory / "scores.json").read_text(encoding="utf-8")))
            configs.append(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory} is no finished run ({error})") from error
    steps = runs[0]["steps"]
    edges = np.linspace(0, steps, _POINTS + 1)
    return {
        "env": runs[0]["env"],
        "preset": runs[0]["preset"],
        "steps": steps,
        "seeds": [run["seed"] for run in runs],
        "final_returns": [mean_between(run["training_returns"], steps - steps / LAST, steps) for run in runs],
        "final_ends_per_step": [
            round(sum(step > steps - steps / LAST for step, _ in run["training_returns"]) * LAST / steps, 5)
            for run in runs
        ],
        "final_metrics": final_metrics(directories, steps),
        "wall_clock_s": round(max(run["wall_clock_s"] for run in runs), 1),
        "device": runs[0]["device"],
        "commit": runs[0]["commit"],
        "versions": {name: text for name, text in runs[0]["versions"].items() if name != "platform"},
        "curve_steps": edges[1:].tolist(),
        "curves": [
            [mean_between(run["training_returns"], low, high) for low, high in itertools.pairwise(edges)]
            for run in runs
        ],
        "config": configs[0]["config"],
    }


def random_play(env: JaxEnv, seeds: Sequence[int], episodes: int) -> dict[str, Any]:
    """What belongs into the data of random play: for each seed the mean return of `episodes` whole episodes."""
    means = []
    for seed in seeds if episodes else ():
        # Not the run's own key: its environment would play the run's first episode among these.
        key = jax.random.fold_in(jax.random.key(seed), _RANDOM)
        means.append(round(float(random_episodes.play(env, key, episodes=episodes)[0].mean()), 4))
    return {"random_episodes": episodes, "random_returns": means}


def mean_between(returns: Sequence[tuple[int, float]], after: float, until: float) -> float | None:
    """Mean return of the episodes that end after step `after`, up to `until`; None if there is none."""
    values = [value for step, value in returns if after < step <= until]
    return round(float(np.mean(values)), 4) if values else None


def table(results: Mapping[str, Any]) -> str:
    """Final return of each seed, and their mean with its standard error."""
    columns = {f"return, last {results['steps'] // LAST:,} steps": results["final_returns"]}
    if results["random_returns"]:
        columns = {f"random, {results['random_episodes']} episodes": results["random_returns"]} | columns
    body = [[f"seed {seed}", *map(_number, row)] for seed, *row in zip(results["seeds"], *columns.values())]
    body.append(["mean ± standard error", *map(_summary, columns.values())])
    return markdown_table([f"{results['env']}, {results['steps']:,} steps", *columns], body)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _summary(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    error = standard_error(known)
    return "" if not known else _number(float(np.mean(known))) + ("" if error is None else f" ± {error:.2f}")


def write(results: Mapping[str, Any], data: pathlib.Path | None, picture: pathlib.Path | None) -> None:
    """Writes the JSON and draws the picture, where a path is given.

    Raises:
      ConfigError: if one cannot be written.
    """
    try:
        if data is not None:
            scores.write(data, results)
        if picture is not None:
            draw(results, picture)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from error


def mean_curve(steps: np.ndarray, curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the seeds, from where to where all have one: a mean over other seeds at every point would mislead.

    Args:
      steps: [P], where the points are.
      curves: [seeds, P], NaN where no episode of a seed ended: there it is on the line between its neighbours.

    Returns:
      steps and means of the points that there are.
    """
    known = [np.flatnonzero(np.isfinite(curve)) for curve in curves]
    if not all(len(points) for points in known):
        return steps[:0], steps[:0]
    within = slice(max(points[0] for points in known), min(points[-1] for points in known) + 1)
    lines = [np.interp(steps, steps[points], curve[points]) for points, curve in zip(known, curves)]
    return steps[within], np.mean(lines, axis=0)[within]


def draw(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Return against agent steps: a thin line per seed, their mean, and the level of random play.

    Raises:
      ConfigError: if matplotlib is missing.
    """
    picture = figures.import_figure()(figsize=(6.4, 3.6), layout="constrained")
    axis = picture.subplots()
    steps = np.asarray(results["curve_steps"])
    curves = np.asarray(results["curves"], np.float64)  # null becomes NaN
    for curve in curves:
        axis.plot(steps[np.isfinite(curve)], curve[np.isfinite(curve)], color="tab:blue", linewidth=0.7, alpha=0.5)
    axis.plot(*mean_curve(steps, curves), color="tab:blue", linewidth=2, label="mean of the seeds")
    if results["random_returns"]:
        axis.axhline(
            float(np.mean(results["random_returns"])), color="0.6", linestyle="--", linewidth=1, label="random"
        )
    axis.set_title(f"{results['env']}, preset {results['preset']}, {len(curves)} seeds")
    axis.set_xlabel("agent steps")
    axis.set_ylabel("return of an episode")
    axis.legend(fontsize=8)
    picture.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures random play anew for data that there are, and draws them again; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.jax_curves", description=main.__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="JSON of experiments.jax_env, renewed")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG of the learning curves (needs matplotlib)")
    parser.add_argument("--random-episodes", type=int, default=100, help="whole episodes for each seed; 0 for none")
    options = parser.parse_args(arguments)
    try:
        check(options.data, options.picture)
        check_random_episodes(options.random_episodes)
        try:
            results = json.loads(options.data.read_text(encoding="utf-8"))
            name, seeds = results["env"], results["seeds"]
            size = results["config"]["agent"]["world_model"]["autoencoder"]["image_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--data {options.data} is no file of experiments.jax_env ({error})") from error
        results |= random_play(jax_env.make(name, size), seeds, options.random_episodes)
        print(table(results))
        write(results, options.data, options.picture)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_random_episodes(episodes: int) -> None:
    """Raises a ConfigError if so many cannot be played side by side."""
    if not 0 <= episodes <= _MOST_RANDOM:
        raise ConfigError(f"--random-episodes must be an integer from 0 to {_MOST_RANDOM}, got {episodes}")


if __name__ == "__main__":
    sys.exit(main())
