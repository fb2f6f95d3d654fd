"""Which run a command continues, whether it may, and what the run's files must look like then."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from drama_jax.action_space import ActionSpace
from drama_jax.config import ConfigError
from drama_jax.training import arrays, config_file, programs, replay_log, run_directory, scores
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.config_file import RunSettings
from drama_jax.training.replay_log import Segment

_MAY_CHANGE = ("steps", "max_skipped_updates", "evaluation/", "logging/")


def find(
    logdir: pathlib.Path,
    game: str,
    preset: str,
    config: RunSettings,
    *,
    resume: bool = True,
    same: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> pathlib.Path | None:
    """The run directory to continue; None for a new run.

    That is `logdir` itself if it holds a config.json, otherwise the newest one of this game, preset and seed that is
    not finished.

    Args:
      logdir: As given on the command line.
      game: CamelCase name.
      preset: Name of the preset.
      config: Its `steps` and `seed` are looked at.
      resume: False for a new run in any case.
      same: Values, by path of the field, that tell a run from others of this seed, as in a sweep.
      say: Shows a message to the user.

    Raises:
      ConfigError: `logdir` is the directory of a run, and that is finished or a new one is wanted.
    """
    if is_run(logdir):
        if not resume:
            raise ConfigError(f"--no-resume: {logdir} holds a run already; name another --logdir, or let it continue")
        if finished(logdir, config.steps):
            raise ConfigError(
                f"--logdir {logdir}: this run is finished; --steps above {config.steps} would train it further"
            )
        return logdir
    if not resume:
        return None
    paths = runs(logdir, game, preset, config, same)
    unfinished = [path for path in paths if not finished(path, config.steps)]
    if unfinished:
        return max(unfinished, key=lambda path: path.name)
    if paths:
        say(f"{max(paths, key=lambda path: path.name)} is finished; this is a new run")
    return None


def runs(
    logdir: pathlib.Path, game: str, preset: str, config: RunSettings, same: Mapping[str, Any] | None = None
) -> list[pathlib.Path]:
    """The directories of all runs of this game, preset and seed that have the values in `same`; see `find`."""
    paths = [path for path in logdir.glob(f"{game}/{preset}/seed{config.seed}-*") if is_run(path)]
    return [path for path in paths if not same or same.items() <= _settings(path).items()]


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    """A run's configuration by path of the field."""
    return config_file.LATER | config_file.flat(config_file.read(directory)["config"])


def is_run(path: pathlib.Path) -> bool:
    """Whether this is the directory of a run."""
    return (path / config_file.NAME).is_file()


def finished(directory: pathlib.Path, steps: int) -> bool:
    """Whether the run has its scores, after at least `steps` steps."""
    reached = scored(directory)
    return reached is not None and reached >= steps


def scored(directory: pathlib.Path) -> int | None:
    """After how many steps the run has its scores; None if it has none, or their file is damaged."""
    try:
        reached = json.loads((directory / "scores.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return reached if isinstance(reached, int) else None


def check(directory: pathlib.Path, game: str, preset: str, config: RunSettings) -> tuple[str, dict[str, list[Any]]]:
    """Compares what a run was started with and what is asked for now.

    Returns:
      The run's identity, and {field: [saved, given]} of the fields that changed and may.

    Raises:
      ConfigError: a field differs that may not, or config.json cannot be read.
    """
    saved = config_file.read(directory)
    before = config_file.LATER | config_file.flat({"game": saved["game"], "preset": saved["preset"], **saved["config"]})
    given = config_file.flat({"game": game, "preset": preset, **dataclasses.asdict(config)})
    changed = {
        name: [before.get(name), given.get(name)]
        for name in sorted(before.keys() | given.keys())
        if before.get(name) != given.get(name)
    }
    for name, (old, new) in changed.items():
        if not name.startswith(_MAY_CHANGE):
            raise ConfigError(
                f"{flag(name)}: the run in {directory} has {_show(old)}, given {_show(new)}; only steps, evaluation "
                f"and logging may change. Give the run's value, or --no-resume for a new run"
            )
    return saved["id"], changed


def note(directory: pathlib.Path, config: RunSettings, step: int, changed: Mapping[str, list[Any]]) -> None:
    """Writes to config.json that the run is continued, where, with what, and what has changed.

    Raises:
      ConfigError: it cannot be written.
    """
    content = config_file.read(directory)
    part = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "step": step, "changed": dict(changed)}
    content["config"] = dataclasses.asdict(config)
    content["continued"] = [*content.get("continued", []), part | dict(run_directory.environment())]
    try:
        scores.write(directory / config_file.NAME, content)
        done = directory / "scores.json"
        if done.exists():  # of fewer steps
            done.rename(directory / f"scores-{json.loads(done.read_text(encoding='utf-8'))['steps']}.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory}: cannot be written to ({error})") from error


def restored_state(
    directory: pathlib.Path, config: RunSettings, num_actions: ActionSpace, snapshot: Snapshot, segments: list[Segment]
) -> Any:
    """The `AgentState` of a checkpoint, replay included, on the default device.

    Raises:
      ConfigError: the arrays are not those of this configuration.
    """
    template = programs.shapes(config.agent, num_actions)
    small = dataclasses.replace(template, replay=replay_log.without_rows(template.replay))
    state = arrays.from_host(small, snapshot.device, "agent/")
    memory = replay_log.with_rows(directory, segments, snapshot.end, state.replay, template.replay)
    return dataclasses.replace(state, replay=memory)


def flag(name: str) -> str:
    """The flag of a field, given as path: agent/replay/tau -> --agent.replay.tau."""
    return "--" + name.replace("/", ".").replace("_", "-").replace("lambda-", "lambda_")


def announce(changed: Mapping[str, list[Any]], say: Callable[[str], None]) -> None:
    """One line for each changed field."""
    for name, (old, new) in changed.items():
        say(f"{flag(name)} {_show(new)} (was {_show(old)})")


def _show(value: Any) -> str:
    return "nothing" if value is None else str(value)
