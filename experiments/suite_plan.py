"""What a suite is asked to do: its flags, and the tasks that they come to."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence

from drama_jax.config import ConfigError
from drama_jax.envs.games import ATARI_100K, canonical_game
from drama_jax.training import resume, run_directory
from experiments import suite_worker
from experiments.atari_options import AllOptions
from experiments.processes import ALONE
from experiments.suite_task import Task


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
    _check_passed(options)
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


def _check_passed(options: AllOptions) -> None:
    """Raises a ConfigError if a flag of `experiments.atari100k` does not go with a suite."""
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


def _check_address(address: str) -> None:
    """Raises a ConfigError if nobody answers at host:port; Ray itself would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", or what Ray will complain about
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray-address {address}: cannot be reached ({error})") from error
