"""Which run directories a command works on, and where each of its agents stands."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Generic, Protocol

from drama_jax.config import ConfigError
from drama_jax.training import checkpoint, metrics_file, resume, run_directory
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.replay_log import Segment
from drama_jax.training.run_directory import RunSettings
from experiments.sweep import Planned, Settings, Settings_co


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
    planned = left
    directories = [_find(options, game, one) for one in planned]
    if None in directories and any(directories):
        begun = [one.label for one, directory in zip(planned, directories) if directory is not None]
        fresh = [one.label for one, directory in zip(planned, directories) if directory is None]
        raise ConfigError(
            f"{', '.join(begun)} has begun and {', '.join(fresh)} has not, but the agents of one process go in step; "
            f"run them in two commands, or all anew with --no-resume"
        )
    found = [directory for directory in directories if directory is not None]
    if not found:
        return [_new(options, game, one, stack) for one in planned]
    return _continued(options, game, planned, found, stack)


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
    return Run(game, planned.config, options.preset, directory, resume.read(directory)["id"], None, [])


def _continued(
    options: Command,
    game: str,
    planned: Sequence[Planned[Settings]],
    directories: Sequence[pathlib.Path],
    stack: contextlib.ExitStack,
) -> list[Run[Settings]]:
    checked = []
    for one, directory in zip(planned, directories):
        checked.append(resume.check(directory, game, options.preset, one.config))
        stack.enter_context(run_directory.lock(directory))
    loaded = [checkpoint.load(directory, identity, say) for directory, (identity, _) in zip(directories, checked)]
    steps = [0 if one is None else one[0].step for one in loaded]
    if len(set(steps)) > 1:
        # Ended in the middle of saving: some have written a checkpoint that others have not.
        common = min(steps)
        _check_step(directories, common)
        loaded = [
            checkpoint.load(directory, identity, say, at_most=common)
            for directory, (identity, _) in zip(directories, checked)
        ]
    runs = []
    for one, directory, (identity, changed), saved in zip(planned, directories, checked, loaded):
        snapshot, segments = saved or (None, [])
        step = 0 if snapshot is None else snapshot.step
        if step > one.config.steps:
            raise ConfigError(f"--steps {one.config.steps}: the run in {directory} has done {step} steps already")
        resume.note(directory, one.config, step, changed)
        metrics_file.cut(directory, step)
        none = "" if snapshot is not None else ", as it has no checkpoint yet"
        print(f"run directory {directory}: going on from step {step}{none}", flush=True)
        resume.announce(changed, say)
        runs.append(Run(game, one.config, options.preset, directory, identity, snapshot, segments))
    return runs


def _check_step(directories: Sequence[pathlib.Path], step: int) -> None:
    """Raises a ConfigError if a run has no checkpoint of `step`; touches nothing."""
    for directory in directories:
        saved = checkpoint.steps_in(directory / checkpoint.FOLDER)
        if step not in saved:
            raise ConfigError(
                f"{directory} cannot go on at step {step}, where another agent of this command is: it has checkpoints "
                f"of {', '.join(map(str, sorted(saved))) or 'no step'}; run them in two commands"
            )


def say(message: str) -> None:
    """Shows a message to the user."""
    print(message, file=sys.stderr, flush=True)
