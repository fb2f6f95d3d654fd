"""Many games and seeds from one command, on all GPUs of this machine or of a Ray cluster, and one table at the end.

    python -m experiments.suite --games all --seeds 5 --preset xs

Every other flag is one of `experiments.atari100k`. The same command started again goes on; what is finished stays.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import shlex
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import drama_jax
from drama_jax.config import ConfigError
from drama_jax.envs.games import ATARI_100K, canonical_game
from drama_jax.training import files, resume, run_directory, scores
from drama_jax.training.signals import stop_requested
from experiments import aggregate, suite_worker
from experiments.atari_options import AllOptions
from experiments.command_line import parse_plain
from experiments.processes import ALONE
from experiments.suite_progress import Progress, Task
from experiments.suite_worker import PROGRAM

_OBJECT_STORE_BYTES = 100_000_000
"""Ray's shared memory on this machine; nothing large goes through it."""
_LOOK_EVERY_S = 0.5
_TOKEN_HINT = "; if the cluster asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
_MEMORY = 0.9
"""Share of a GPU's memory that the tasks on it take together."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The suite's own flags; every other one goes to experiments.atari100k (its --help)."""

    games: tuple[str, ...] = ("all",)
    """Names, or all: the 26 of the Atari 100k benchmark."""
    seeds: int = 5
    """Agents per game, of seeds SEED, SEED + 1, ..."""
    seed: int = 0
    """The first of them."""
    seeds_per_task: int | None = None
    """How many share a process; all of a game if not given."""
    gpus_per_task: float | None = None
    """GPUs, or a share of one; if not given, 1 where there are GPUs, otherwise 0."""
    cpus_per_task: float = 2
    """CPU cores that Ray counts for a task."""
    ray_address: str | None = None
    """A cluster's, for example auto or 10.0.0.1:6379, whose machines share LOGDIR; none: Ray on this machine."""
    retries: int = 3
    """How often a task may be started again after its process died or failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; returns the exit code.

    0: it is finished, or a signal ended it and it is saved. 1: a task failed for good. 2: a mistake of the user.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        own, passed = split(arguments)
        suite = parse_plain(Options, own, PROGRAM, __doc__)
        options, tasks = plan(suite, passed)
        ray = _import_ray()
        # The devices are for the workers.
        jax.config.update("jax_platforms", "cpu")
        with stop_requested() as stop:
            failed, stopped = ([], False) if all(task.done for task in tasks) else _run(ray, suite, tasks, stop)
            if stopped and not all(task.done for task in tasks):
                print(f"stopped; to continue:\n{PROGRAM} {shlex.join(arguments)}", flush=True)
                return 0
        report(options, tasks, f"{PROGRAM} {shlex.join(arguments)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The suite's own arguments, and those of `experiments.atari100k`; a value goes with the flag before it."""
    names = {"-h", "--help", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Options))}
    own: list[str] = []
    passed: list[str] = []
    current = own
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            current = own if argument.partition("=")[0].replace("_", "-") in names else passed
        current.append(argument)
    return own, passed


def plan(suite: Options, passed: Sequence[str]) -> tuple[AllOptions, list[Task]]:
    """The tasks, after everything that can be wrong has been looked at; `passed` goes to atari100k.

    Raises:
      ConfigError: for any mistake in the arguments, or if a run that is there was started with other settings.
    """
    games = _games(suite.games)
    _check(suite, passed)
    if suite.ray_address is not None:
        _check_address(suite.ray_address)
    size = suite.seeds if suite.seeds_per_task is None else suite.seeds_per_task
    seeds = range(suite.seed, suite.seed + suite.seeds)
    options, *_ = suite_worker.plan(games[0], seeds, passed)
    if any(dataclasses.asdict(options.sweep).values()):
        raise ConfigError("--sweep: the suite runs one setting; give each value a suite and a --logdir of its own")
    if options.distributed != ALONE:
        raise ConfigError(
            "--distributed: the suite is one process that has many; to use several machines, --ray-address"
        )
    if not options.resume:
        raise ConfigError("--no-resume: the suite goes on with what is there; name another --logdir for a new one")
    if resume.is_run(options.logdir):
        raise ConfigError(f"--logdir {options.logdir} is the directory of one run; name one for all of them")
    run_directory.check(options.logdir)
    logdir = options.logdir.absolute()
    # Workers run in other directories; the last --logdir counts.
    arguments = (*passed, "--logdir", str(logdir))
    tasks = []
    for game in games:
        for start in range(0, len(seeds), size):
            group = seeds[start : start + size]
            parsed, _, planned = suite_worker.plan(game, group, arguments)
            tasks.append(Task(parsed, game, group, arguments, planned))
            _check_runs(tasks[-1])
    return tasks[0].options, tasks


def _games(names: Sequence[str]) -> list[str]:
    if list(names) == ["all"]:
        return list(ATARI_100K)
    try:
        games = [canonical_game(name) for name in names]
    except ConfigError as error:
        raise ConfigError(f"--games: {error}; or all") from None
    if not games:
        raise ConfigError("--games needs a name, or all")
    if len(set(games)) < len(games):
        raise ConfigError(f"--games names {next(game for game in games if games.count(game) > 1)} twice; leave one out")
    return games


def _check(suite: Options, passed: Sequence[str]) -> None:
    if any(argument.partition("=")[0] == "--game" for argument in passed):
        raise ConfigError("--game: the suite takes several; name them with --games")
    for name, lowest in (("seeds", 1), ("seeds_per_task", 1), ("retries", 0), ("gpus_per_task", 0)):
        value = getattr(suite, name)
        if value is not None and not value >= lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")
    if not 0 < suite.cpus_per_task < float("inf"):
        raise ConfigError(f"--cpus-per-task {suite.cpus_per_task}: must be more than 0")
    gpus = suite.gpus_per_task
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ConfigError(f"--gpus-per-task {gpus}: must be a share of one GPU, or a whole number")


def _check_runs(task: Task) -> None:
    """Raises a ConfigError if a run that the task would go on with, or count, has other settings."""
    for one in task.planned:
        runs = resume.runs(task.options.logdir, task.game, task.options.preset, one.config)
        unfinished = [path for path in runs if not resume.finished(path, one.config.steps)]
        if runs:
            try:
                newest = max(unfinished or runs, key=lambda path: path.name)
                resume.check(newest, task.game, task.options.preset, one.config)
            except ConfigError as error:
                raise ConfigError(str(error).replace("--no-resume for a new run", "another --logdir")) from None


def _import_ray() -> Any:
    # Nothing is reported to Ray's authors, and a task without a GPU gets no advice about it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("Ray is not installed: run python -m pip install -e '.[suite]'") from error
    return ray


def _run(ray: Any, suite: Options, tasks: Sequence[Task], stop: Callable[[], bool]) -> tuple[list[str], bool]:
    """Runs the tasks that are not finished; returns a line for each that failed for good, and whether to stop."""
    _connect(ray, suite)
    try:
        with stop_requested() as stop_now:  # Ray has put a handler of its own in place
            failed = _schedule(ray, suite, tasks, lambda: stop() or stop_now())
            return failed, stop() or stop_now()
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises a ConfigError if nobody answers at host:port; Ray itself would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", or what Ray will complain about
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray-address {address}: cannot be reached ({error})") from error


def _connect(ray: Any, suite: Options) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if suite.ray_address is None:
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        else:
            places = [*drama_jax.__path__, str(pathlib.Path(__file__).parent)]
            code = [str(pathlib.Path(place).absolute()) for place in places]
            ray.init(suite.ray_address, runtime_env={"py_modules": code}, **quiet)
    except (ConnectionError, ValueError, OSError, RuntimeError, ray.exceptions.RayError) as error:
        where = "Ray could not start" if suite.ray_address is None else f"--ray-address {suite.ray_address}"
        hint = "" if suite.ray_address is None else _TOKEN_HINT
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:200]}{hint}") from error


def _schedule(ray: Any, suite: Options, tasks: Sequence[Task], stop: Callable[[], bool]) -> list[str]:
    directory = tasks[0].logs
    stop_file = directory / f"stop-{uuid.uuid4().hex[:8]}"
    submit = _submitter(ray, suite, stop_file)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--logdir {directory.parent}: cannot be written to ({error.strerror})") from error
    waiting = {submit(task): task for task in tasks if not task.done}
    failed = []
    progress = Progress(tasks)
    try:
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_EVERY_S)
            for reference in ended:
                task = waiting.pop(reference)
                task.outcome, reason = _outcome(ray, reference, stop_file.exists())
                if reason:
                    failed.append(f"{task.label} failed: {task.last_error() or reason}; see {task.log}")
            if stop() and not stop_file.exists():
                stop_file.touch()
                for reference, task in waiting.items():
                    if not task.state_file.exists():
                        ray.cancel(reference)
            progress.show()
        progress.close()
    finally:
        stop_file.unlink(missing_ok=True)
        for task in tasks:
            task.state_file.unlink(missing_ok=True)
    return failed


def _submitter(ray: Any, suite: Options, stop_file: pathlib.Path) -> Callable[[Task], Any]:
    """Gives a function that hands a task to Ray."""
    resources = ray.cluster_resources()
    gpus = suite.gpus_per_task if suite.gpus_per_task is not None else float(resources.get("GPU", 0) > 0)
    if suite.ray_address is None:  # a cluster may grow
        for name, flag, wanted in (("GPU", "--gpus-per-task", gpus), ("CPU", "--cpus-per-task", suite.cpus_per_task)):
            if wanted > resources.get(name, 0):
                raise ConfigError(f"{flag} {wanted:g}: this machine has {resources.get(name, 0):g}")
    environment = worker_environment(gpus, os.environ)
    root = None if suite.ray_address else str(pathlib.Path(__file__).parents[1])

    # Ray sends an inner function by value, so the worker imports nothing before its environment is set.
    def run(root: str | None, environment: dict[str, str], task: dict[str, Any]) -> str:
        import os
        import sys

        os.environ.update(environment)
        if root is not None:
            sys.path.insert(0, root)
        from experiments import suite_worker

        return suite_worker.work(**task)

    remote = ray.remote(
        num_cpus=suite.cpus_per_task,
        num_gpus=gpus,
        max_retries=suite.retries,
        retry_exceptions=True,
        max_calls=1,  # the process ends with the task, which frees the device's memory
    )(run)

    def submit(task: Task) -> Any:
        task.state_file.unlink(missing_ok=True)
        paths = {"log": str(task.log), "state": str(task.state_file), "stop": str(stop_file)}
        what = {"game": task.game, "seeds": list(task.seeds), "arguments": list(task.arguments), "files": paths}
        return remote.remote(root, environment, what)

    return submit


def worker_environment(gpus: float, given: Mapping[str, str]) -> dict[str, str]:
    """What JAX must find in a worker's environment before it starts; what the user has set stays."""
    if gpus == 0:
        wanted = {"JAX_PLATFORMS": "cpu"}
    else:
        wanted = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY * min(gpus, 1.0):.3f}"}
    return {name: value for name, value in wanted.items() if name not in given}


def _outcome(ray: Any, reference: Any, stopping: bool) -> tuple[str, str | None]:
    """How a task has ended, and why if it has failed."""
    try:
        return ray.get(reference), None
    except ray.exceptions.RayError as error:
        if stopping:
            return "stopped", None
        return "failed", str(error).strip().splitlines()[-1]


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
    notes = [
        f"`{command}`",
        f"Preset {options.preset}, {options.steps:,} steps. Per game the mean over seeds and its standard error; "
        f"below, statistics of the human-normalised scores with {aggregate.LEVEL:.0%} stratified bootstrap intervals "
        f"over {aggregate.RESAMPLES:,} resamples. Published columns give no single runs, so no interquartile mean; "
        f"`games` counts the scores that a column has.",
        *([f"{missing} runs have no score yet."] if missing else []),
    ]
    text = "\n\n".join(["# The suite", *notes, aggregate.markdown(result, all_columns=True)]) + "\n"
    try:
        scores.write(options.logdir / "suite.json", described | result)
        files.write(options.logdir / "suite.md", text.encode())
    except OSError as error:
        raise ConfigError(f"--logdir {options.logdir}: cannot be written to ({error.strerror})") from error
    print(aggregate.markdown(result, all_columns=False))
    print(*([f"{missing} runs have no score"] if missing else []), options.logdir / "suite.md", sep="\n", flush=True)
    return described | result


if __name__ == "__main__":
    sys.exit(main())
