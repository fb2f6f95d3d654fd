"""Checkpoints: <run>/checkpoints/<step>/, from which a run goes on exactly where it was.

agent/         every array of the agent and of the loop (orbax), but for the rows of the replay
loop.npz       what the loop keeps on the host, and the emulator's state
manifest.json  size and SHA-256 of these files, and of the replay segments that belong to them

Here they are read; `checkpoint_writer` writes them. Loading executes no code from a checkpoint: nothing in it is
pickled, and no file is read before its SHA-256 has been compared.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from drama_jax import checks
from drama_jax.config import ConfigError
from drama_jax.training import arrays, files, manifest, orbax_arrays, replay_log, weights
from drama_jax.training.manifest import Invalid
from drama_jax.training.replay_log import Segment

State = TypeVar("State")
FOLDER = "checkpoints"
AGENT, LOOP = "agent", "loop.npz"
"""What a checkpoint's directory holds besides its manifest."""
# What readers raise where the digests are right and the content is not.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
# What the model is; all else under agent/ serves its training.
_WEIGHTS = ("world_model/params/", "world_model/batch_stats/", "behaviour/params/", "behaviour/normaliser/")


@dataclasses.dataclass
class Snapshot:
    """A run between two steps, on the host; all of it but the rows of the replay."""

    step: int
    """Agent steps taken."""
    end: int
    """Steps the agent has been given."""
    device: dict[str, np.ndarray]
    """What lives on the device, by path: `agent/...`, `acting/...` and so on."""
    header: dict[str, Any]
    """Numbers the loop keeps, as JSON."""
    host: dict[str, np.ndarray]
    """Arrays the loop keeps."""


def load(
    run: pathlib.Path, identity: str, say: Callable[[str], None] = print, *, at_most: int | None = None
) -> tuple[Snapshot, list[Segment]] | None:
    """The newest checkpoint of a run that is whole, with the replay segments that belong to it.

    Newer ones that are damaged are named in a message each, and renamed to `<step>.damaged`. With `at_most`, those of
    later steps are renamed to `<step>.ahead`.

    Returns:
      None if the run never completed a checkpoint.

    Raises:
      ConfigError: there are checkpoints, and none can be used.
    """
    steps, problems = steps_in(run / FOLDER), []
    for step in [step for step in steps if at_most is not None and step > at_most]:
        aside = _put_aside(run / FOLDER / str(step), "ahead")
        say(f"checkpoint {step} is of a later step than another agent's; it is now {aside}")
        steps.remove(step)
    for step in steps:
        directory = run / FOLDER / str(step)
        try:
            found = manifest.verify(directory, run, identity)
            snapshot = _read(directory, found)
            segments = [_segment(name) for name in found.segments]
        except Invalid as error:
            problems.append((directory, f"checkpoint {step}: {error}"))
            continue
        for damaged, problem in problems:
            say(f"{problem}; it is now {_put_aside(damaged, 'damaged')}, and checkpoint {step} is used")
        return snapshot, segments
    if not steps:
        return None
    raise ConfigError(
        f"{run}: no checkpoint can be used: {'; '.join(problem for _, problem in problems)}. Restore the files from a "
        f"backup, or start anew with --no-resume; nothing was removed"
    )


def restore(directory: pathlib.Path, state: State, step: int | None = None) -> State:
    """The agent of a checkpoint in the structure of `state`, which keeps its replay.

    Args:
      directory: As for `load_weights`.
      state: An `AgentState` of the same configuration, for instance from `agent.init`.
      step: Which checkpoint; the newest if None.

    Raises:
      ConfigError: if there is no such checkpoint, or it is damaged or of another configuration.
    """
    template = dataclasses.replace(state, replay=None)  # type: ignore[type-var]
    saved = _arrays(_find(directory, step))
    restored = arrays.from_host(template, saved, "agent/")
    return dataclasses.replace(restored, replay=state.replay)  # type: ignore[attr-defined, no-any-return]


def load_weights(path: pathlib.Path | str, step: int | None = None) -> dict[str, Any]:
    """The model alone, as nested dicts of numpy arrays; needs no configuration and no accelerator.

    Args:
      path: A run directory, its checkpoints directory, one checkpoint, or a file written by `weights.write`.
      step: Which checkpoint; the newest that is whole if None.

    Returns:
      {"world_model": {"params", "batch_stats"}, "behaviour": {"params", "normaliser"}}.

    Raises:
      ConfigError: if there is no such checkpoint, or it is damaged.
      TypeError: if `path` is no path or `step` no integer.
    """
    checks.instances("checkpoint", path=(path, (str, pathlib.Path)), step=(step, (int, type(None))))
    if pathlib.Path(path).suffix == weights.SUFFIX:
        return weights.read(pathlib.Path(path))
    saved = _arrays(_find(path, step))
    agent = {name.removeprefix("agent/"): array for name, array in saved.items()}
    return arrays.nest({name: array for name, array in agent.items() if name.startswith(_WEIGHTS)})


def newest(run: pathlib.Path) -> int:
    """Step of the checkpoint that `load_weights` takes from a run.

    Raises:
      ConfigError: if none can be used.
    """
    return int(_find(run / FOLDER, None).name)


def _arrays(directory: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return orbax_arrays.read(directory / AGENT)
    except _UNREADABLE as error:
        raise ConfigError(f"{directory / AGENT} cannot be read ({reason(error)})") from error


def _find(path: pathlib.Path | str, step: int | None) -> pathlib.Path:
    """The directory of a verified checkpoint."""
    checks.instances("checkpoint", path=(path, (str, pathlib.Path)), step=(step, (int, type(None))))
    path = pathlib.Path(path)
    if (path / manifest.NAME).exists() or (path / AGENT).exists():
        candidates = [path]
    else:
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        steps = steps_in(folder)
        if not steps or step not in (None, *steps):
            wanted = "" if step is None else f" of step {step}"
            raise ConfigError(f"no checkpoint{wanted} in {path}; there: {sorted(steps) or 'none'}")
        candidates = [folder / str(one) for one in steps if step in (None, one)]
    problems = []
    for candidate in candidates:
        try:
            manifest.verify(candidate.absolute())
        except Invalid as error:
            problems.append(f"{candidate}: {error}")
        else:
            return candidate
    raise ConfigError(f"no checkpoint can be used: {'; '.join(problems)}; name another one")


def steps_in(folder: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, the newest first; none if it is not there."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    # As this program writes them: neither "030" nor digits of another script.
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def _segment(name: str) -> Segment:
    segment = replay_log.parse_name(name)
    if segment is None:
        raise Invalid(f"{manifest.NAME} names {name}, which is no part of a replay")
    return segment


def _read(directory: pathlib.Path, found: manifest.Manifest) -> Snapshot:
    try:
        host = files.unpack(directory / LOOP)
        header = json.loads(host.pop("header").tobytes())
        return Snapshot(found.step, found.end, orbax_arrays.read(directory / AGENT), header, host)
    except _UNREADABLE as error:
        raise Invalid(f"cannot be read ({reason(error)})") from error


def _put_aside(directory: pathlib.Path, why: str) -> pathlib.Path:
    """Renames a checkpoint to `<step>.<why>`, with a number where that is taken."""
    free = wanted = directory.with_name(f"{directory.name}.{why}")
    count = 1
    while free.exists():
        count += 1
        free = wanted.with_name(f"{wanted.name}{count}")
    files.rename(directory, free)
    return free


def reason(error: Exception) -> str:
    """What an error says, as one line; a path and the system's message, where there are both."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
