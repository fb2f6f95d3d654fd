"""What the suite does inside a Ray worker: the agents of one task, from where their run directories stand."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from drama_jax.config import RunConfig
from drama_jax.training import checkpoint, resume, scores
from experiments import atari100k, atari_options, runs, sweep
from experiments.atari_options import AllOptions
from experiments.sweep import Planned

PROGRAM = "python -m experiments.suite"
_LOOK_EVERY_S = 0.3
_IN_USE_S = 3.0


class Unfinished(RuntimeError):  # noqa: N818 - says what the task is
    """The task ended before its agents were finished; Ray starts it again, as often as it may."""


def work(game: str, seeds: Sequence[int], arguments: Sequence[str], files: dict[str, str]) -> str:
    """Trains and evaluates the agents of a task that are not finished.

    Args:
      game: CamelCase name.
      seeds: Consecutive.
      arguments: Of `experiments.atari100k`, without game and seeds.
      files: Paths: "log" takes the output, "state" says that the task is running, "stop" ends it once it is there.

    Returns:
      "finished" or "stopped".

    Raises:
      Unfinished: if it is neither.
    """
    stop = pathlib.Path(files["stop"])
    with _output_to(pathlib.Path(files["log"])), _stopped_by(stop):
        _note(pathlib.Path(files["state"]))
        for part in parts(*plan(game, seeds, arguments)):
            if stop.exists():
                return "stopped"
            first, last = part[0].config.seed, part[-1].config.seed
            code = atari100k.main([*arguments, *flags(game, range(first, last + 1))])
            if code == 2:
                time.sleep(_IN_USE_S)  # perhaps a run is in use by a process that is about to end
            if code:
                raise Unfinished(f"exit code {code}")
        if not parts(*plan(game, seeds, arguments)):
            return "finished"
        if stop.exists():
            return "stopped"
        raise Unfinished("ended by a signal")


def flags(game: str, seeds: Sequence[int]) -> list[str]:
    """What names the agents of a task to `experiments.atari100k`."""
    return ["--game", game, "--seed", str(seeds[0]), "--seeds", str(len(seeds))]


def plan(game: str, seeds: Sequence[int], arguments: Sequence[str]) -> tuple[AllOptions, str, list[Planned[RunConfig]]]:
    """The agents of a task. Raises a ConfigError for any mistake in the arguments."""
    options, config = atari_options.parse([*arguments, *flags(game, seeds)], PROGRAM)
    return options, game, sweep.plan(config, options.seeds, options.sweep)


def parts(options: AllOptions, game: str, planned: Sequence[Planned[RunConfig]]) -> list[list[Planned[RunConfig]]]:
    """The agents that are not finished, those together that can go on in one process.

    They can if none has begun, or if all have a checkpoint of the same step.
    """
    result: list[list[Planned[RunConfig]]] = []
    steps: list[set[int] | None] = []
    for one in planned:
        if runs.finished(options, game, one) is not None:
            continue
        its = _steps(options, game, one)
        if not result or not _in_step([*steps, its]):
            result.append([])
            steps = []
        result[-1].append(one)
        steps.append(its)
    return result


def _steps(options: AllOptions, game: str, one: Planned[RunConfig]) -> set[int] | None:
    """The steps at which an agent's run can go on; None if it has not begun."""
    directories = resume.runs(options.logdir, game, options.preset, one.config)
    unfinished = [directory for directory in directories if not resume.finished(directory, one.config.steps)]
    if not unfinished:
        return None
    newest = max(unfinished, key=lambda path: path.name)
    return set(checkpoint.steps_in(newest / checkpoint.FOLDER)) or {0}


def _in_step(steps: Sequence[set[int] | None]) -> bool:
    begun = [one for one in steps if one is not None]
    if not begun or len(begun) < len(steps):
        return not begun
    first = min(max(one) for one in begun)
    return all(first in one for one in begun)


def _note(path: pathlib.Path) -> None:
    """Says on disk, and in the log, which process works on the task, and for which time."""
    attempt = read(path).get("attempt", 0) + 1
    scores.write(path, {"attempt": attempt, "pid": os.getpid(), "host": socket.gethostname()})
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"--- {now}, process {os.getpid()} on {socket.gethostname()}, attempt {attempt}", flush=True)


def read(path: pathlib.Path) -> dict[str, Any]:
    """What a running task has said of itself; nothing if it has not begun."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


@contextlib.contextmanager
def _output_to(path: pathlib.Path) -> Iterator[None]:
    """Appends everything that this process writes, compilers included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    yield
                except BaseException:
                    traceback.print_exc()
                    raise
        finally:
            for number, copy in enumerate(before, start=1):
                os.dup2(copy, number)
                os.close(copy)


@contextlib.contextmanager
def _stopped_by(path: pathlib.Path) -> Iterator[None]:
    """Sends this process SIGTERM once the file `path` is there, for which a run saves and ends."""
    # Ray's own handler would end the process. Without one the call below does nothing, so a run is told when it
    # listens, and not twice.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY_S):
            if path.exists():
                _thread.interrupt_main(signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)
