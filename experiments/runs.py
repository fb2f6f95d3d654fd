"""Which run directories a command works on, and where each of its agents stands."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol

from drama_jax.config import ConfigError
from drama_jax.training import checkpoint, config_file, metrics_file, resume, run_directory
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.config_file import RunSettings
from drama_jax.training.replay_log import Segment
from experiments.sweep import Planned, Settings, Settings_co

Saved = tuple[Snapshot, list[Segment]]
"""A run between two steps, and its replay on disk."""


class Command(Protocol):
    """What is asked of the options of a command."""

    @property
    def logdir(self) -> pathlib.Path:
        """Where its runs are, or the directory of its one run."""
        ...

    @property
    def preset(self) -> str:
        """Name of the preset."""
        ...

    @property
    def resume(self) -> bool:
        """False for new runs in any case."""
        ...


@dataclasses.dataclass(frozen=True)
class Run(Generic[Settings_co]):
    """A run directory, locked, and where the run of its one agent stands."""

    game: str
    config: Settings_co
    preset: str
    directory: pathlib.Path
    identity: str
    snapshot: Snapshot | None
    """Where to go on from; None to start at step 0."""
    segments: list[Segment]
    """The replay on disk."""

    @property
    def step(self) -> int:
        """Agent steps done."""
        return 0 if self.snapshot is None else self.snapshot.step


def unfinished(
    options: Command, game: str, planned: Sequence[Planned[Settings]], *, shared: bool = False
) -> list[Planned[Settings]]:
    """The agents that a command trains; `shared` if it has others that other processes train.

    Of several, those that are finished are left out, unless all are. A process that has only a share of a command's
    agents leaves its finished ones out in any case, because it cannot tell whether the others' are, or were a moment
    ago.
    """
    if not options.resume or (len(planned) == 1 and not shared):
        return list(planned)
    left = [one for one in planned if finished(options, game, one) is None]
    return left if left or shared else list(planned)


def prepare(
    options: Command,
    game: str,
    planned: Sequence[Planned[Settings]],
    stack: contextlib.ExitStack,
    *,
    shared: bool = False,
) -> list[Run[Settings]]:
    """Finds the runs to continue or creates new directories, and locks them until `stack` is closed.

    Only those that `unfinished` names; they all start at one step.

    Raises:
      ConfigError: if one cannot be continued as asked for, or is in use, or if they are not at one step.
    """
    if (len(planned) > 1 or shared) and resume.is_run(options.logdir):
        raise ConfigError(
            f"--logdir {options.logdir} is the directory of one run, and this command has {len(planned)} agents; name "
            f"the directory that holds their runs"
        )
    left = unfinished(options, game, planned, shared=shared)
    for one in planned:
        if one not in left:
            say(f"{one.label} is finished")
    directories = [_find(options, game, one) for one in left]
    _check_begun(left, directories)
    begun = [(one, directory) for one, directory in zip(left, directories) if directory is not None]
    continued = iter(_continued(options, game, begun, stack))
    return [
        _new(options, game, one, stack) if directory is None else next(continued)
        for one, directory in zip(left, directories)
    ]


def _check_begun(planned: Sequence[Planned[RunSettings]], directories: Sequence[pathlib.Path | None]) -> None:
    """Raises a ConfigError if some agents have a checkpoint where others have no run directory yet.

    Agents without a checkpoint are all at step 0: a command may have ended between creating their directories.
    """
    fresh = [one.label for one, directory in zip(planned, directories) if directory is None]
    ahead = [
        one.label for one, directory in zip(planned, directories) if directory is not None and _steps_saved(directory)
    ]
    if fresh and ahead:
        raise ConfigError(
            f"{', '.join(ahead)} has begun and {', '.join(fresh)} has not, but the agents of one process go in step; "
            f"run them in two commands, or all anew with --no-resume"
        )


def _find(options: Command, game: str, planned: Planned[RunSettings]) -> pathlib.Path | None:
    return resume.find(
        options.logdir, game, options.preset, planned.config, resume=options.resume, same=planned.same, say=say
    )


def finished(options: Command, game: str, planned: Planned[RunSettings]) -> pathlib.Path | None:
    """The directory of an agent's newest run if it is finished and none is under way."""
    directories = resume.runs(options.logdir, game, options.preset, planned.config, planned.same)
    if directories and all(resume.finished(directory, planned.config.steps) for directory in directories):
        return max(directories, key=lambda path: path.name)
    return None


def _new(options: Command, game: str, planned: Planned[Settings], stack: contextlib.ExitStack) -> Run[Settings]:
    directory = run_directory.create(options.logdir, game, options.preset, planned.config)
    stack.enter_context(run_directory.lock(directory))
    print(f"run directory {directory}", flush=True)
    return Run(game, planned.config, options.preset, directory, config_file.read(directory)["id"], None, [])


def _continued(
    options: Command,
    game: str,
    begun: Sequence[tuple[Planned[Settings], pathlib.Path]],
    stack: contextlib.ExitStack,
) -> list[Run[Settings]]:
    checked = []
    for one, directory in begun:
        checked.append(resume.check(directory, game, options.preset, one.config))
        stack.enter_context(run_directory.lock(directory))
    directories, identities = [directory for _, directory in begun], [identity for identity, _ in checked]
    runs = []
    for (one, directory), (identity, changed), saved in zip(begun, checked, _in_step(directories, identities)):
        snapshot, segments = saved or (None, [])
        run = Run(game, one.config, options.preset, directory, identity, snapshot, segments)
        _go_on(run, changed)
        runs.append(run)
    return runs


def _in_step(directories: Sequence[pathlib.Path], identities: Sequence[str]) -> list[Saved | None]:
    """The runs' checkpoints of the newest step that all have; None for those that never completed one."""
    loaded = [checkpoint.load(directory, identity, say) for directory, identity in zip(directories, identities)]
    steps = {0 if one is None else one[0].step for one in loaded}
    if len(steps) <= 1:
        return loaded
    # Ended in the middle of saving: some have written a checkpoint that others have not.
    _check_step(directories, min(steps))
    return [
        checkpoint.load(directory, identity, say, at_most=min(steps))
        for directory, identity in zip(directories, identities)
    ]


def _check_step(directories: Sequence[pathlib.Path], step: int) -> None:
    """Raises a ConfigError if a run cannot go on at `step`; touches nothing."""
    for directory in directories:
        saved = _steps_saved(directory)
        first_save = step == 0 and len(saved) == 1  # all begin anew; of two, the other run has lost its own
        if saved and step not in saved and not first_save:
            raise ConfigError(
                f"{directory} cannot go on at step {step}, where another agent of this command is: it has checkpoints "
                f"of {', '.join(map(str, sorted(saved)))}; run them in two commands"
            )


def _go_on(run: Run[Settings], changed: Mapping[str, list[Any]]) -> None:
    """Notes in the run's files that it goes on, and tells the user.

    Raises:
      ConfigError: if it has done more steps than are wanted, or its files cannot be written.
    """
    if run.step > run.config.steps:
        raise ConfigError(f"--steps {run.config.steps}: the run in {run.directory} has done {run.step} steps already")
    resume.note(run.directory, run.config, run.step, changed)
    metrics_file.cut(run.directory, run.step)
    none = "" if run.snapshot is not None else ", as it has no checkpoint yet"
    print(f"run directory {run.directory}: going on from step {run.step}{none}", flush=True)
    resume.announce(changed, say)


def _steps_saved(directory: pathlib.Path) -> list[int]:
    return checkpoint.steps_in(directory / checkpoint.FOLDER)


def say(message: str) -> None:
    """Shows a message to the user."""
    print(message, file=sys.stderr, flush=True)
