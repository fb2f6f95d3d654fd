"""Many games and seeds from one command, on all GPUs of this machine or of a Ray cluster, and one table at the end.

    python -m experiments.suite --games all --seeds 5 --preset xs

Every other flag is one of `experiments.atari100k`. The same command started again goes on; what is finished stays.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from drama_jax.config import ConfigError
from drama_jax.training import files, scores
from drama_jax.training.logging import say
from drama_jax.training.signals import stop_requested
from experiments import aggregate, suite_plan, suite_ray
from experiments.atari_options import AllOptions
from experiments.command_line import parse_plain
from experiments.suite_plan import Options
from experiments.suite_task import Task
from experiments.suite_worker import PROGRAM


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; returns the exit code.

    0: it is finished, or a signal ended it and it is saved. 1: a task failed for good. 2: a mistake of the user.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = f"{PROGRAM} {shlex.join(arguments)}"
    try:
        own, passed = suite_plan.split(arguments)
        suite = parse_plain(Options, own, PROGRAM, __doc__)
        options, tasks = suite_plan.plan(suite, passed)
        ray = suite_ray.import_ray()
        # The devices are for the workers.
        jax.config.update("jax_platforms", "cpu")
        with stop_requested() as stop:
            failed, stopped = ([], False) if _done(tasks) else suite_ray.run(ray, suite, tasks, stop)
            if stopped and not _done(tasks):
                say(f"stopped; to continue:\n{command}", sys.stdout)
                return 0
        report(options, tasks, command)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def _done(tasks: Sequence[Task]) -> bool:
    return all(task.done for task in tasks)


def report(options: AllOptions, tasks: Sequence[Task], command: str) -> dict[str, Any]:
    """Writes suite.json and suite.md, and prints the table.

    Raises:
      ConfigError: if they cannot be written.
    """
    raw: dict[str, list[float]] = {task.game: [] for task in tasks}
    runs: dict[str, list[dict[str, Any]]] = {task.game: [] for task in tasks}
    for task in tasks:
        for seed, directory, mean in task.scores():
            runs[task.game].append({"seed": seed, "run": directory, "score": mean})
            if mean is not None:
                raw[task.game].append(mean)
    result = aggregate.summary(raw)
    described = {"command": command, "preset": options.preset, "steps": options.steps, "runs": runs}
    missing = sum(one["score"] is None for rows in runs.values() for one in rows)
    try:
        scores.write(options.logdir / "suite.json", described | result)
        files.write(options.logdir / "suite.md", _text(described, result, missing).encode())
    except OSError as error:
        raise ConfigError(f"--logdir {options.logdir}: cannot be written to ({error.strerror})") from error
    print(aggregate.markdown(result, all_columns=False))
    print(*([f"{missing} runs have no score"] if missing else []), options.logdir / "suite.md", sep="\n", flush=True)
    return described | result


def _text(described: Mapping[str, Any], result: Mapping[str, Any], missing: int) -> str:
    """suite.md."""
    about = (
        f"Preset {described['preset']}, {described['steps']:,} steps. Per game the mean over seeds and its standard "
        f"error; below, statistics of the human-normalised scores with {aggregate.LEVEL:.0%} stratified bootstrap "
        f"intervals over {aggregate.RESAMPLES:,} resamples. Published columns give no single runs, so no interquartile "
        f"mean; `games` counts the scores that a column has."
    )
    notes = [f"`{described['command']}`", about, *([f"{missing} runs have no score yet."] if missing else [])]
    return "\n\n".join(["# The suite", *notes, aggregate.markdown(result, all_columns=True)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
