"""The directory of a run: runs/<game>/<preset>/seed<k>-<time>/.

config.json      the resolved configuration, versions, device, commit; one more entry each time the run is continued
metrics.jsonl    one line per logging interval and per episode, with `step` and `seconds` of training so far
tensorboard/     the same as TensorBoard events
images/          reconstructions and imagined rollouts
checkpoints/     see `checkpoint`
replay/          see `replay_log`
scores.json      written at the end
lock             held by the process that writes to the directory
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import time
import typing
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import jax

from drama_jax.config import AgentConfig, ConfigError, RunConfig, TaskRunConfig
from drama_jax.training import scores

CONFIG = "config.json"
LATER = {
    "agent/world_model/autoencoder/vector_size": 0,
    "agent/world_model/autoencoder/vector_layers": 3,
    "agent/world_model/autoencoder/vector_units": 256,
    "agent/world_model/backbone/mixer_width": 0,
    "agent/world_model/backbone/feedforward_width": 0,
    "agent/world_model/backbone/max_length": 128,
    "agent/world_model/backbone/dropout": 0.0,
    "agent/world_model/backbone/attention_dropout": 0.0,
    "agent/imagination/draw_terminations": False,
    "agent/behaviour/name": "actor_critic",
    "agent/behaviour/epochs": 3,
    "agent/behaviour/minibatch_size": 16_384,
    "agent/behaviour/clip_ratio": 0.2,
    "agent/fidelity/gradient_through_clip": True,
    "agent/world_model/free_bits_each": False,
}
"""Fields that run directories of older versions lack, and what those versions did."""
_PACKAGES = ("drama_jax", "jax", "jaxlib", "flax", "optax", "chex", "numpy", "orbax-checkpoint", "envpool", "ale-py")


class RunSettings(Protocol):
    """A configuration of any kind of run: a dataclass that has at least these fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def agent(self) -> AgentConfig:
        """What is trained."""
        ...

    @property
    def steps(self) -> int:
        """Agent steps to train for."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...


def check(logdir: pathlib.Path) -> None:
    """Raises a ConfigError if a run directory cannot be created below `logdir`; creates nothing."""
    if "\0" in str(logdir):
        raise ConfigError(f"--logdir {str(logdir)!r}: a path has no zero bytes; name a directory")
    try:
        existing = next(path for path in (logdir, *logdir.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"--logdir {str(logdir)[:80]}: {error.strerror}") from error
    if not existing.is_dir():
        raise ConfigError(f"--logdir {logdir}: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--logdir {logdir}: {existing} cannot be written to; name a directory that can")


def create(logdir: pathlib.Path, game: str, preset: str, config: RunSettings) -> pathlib.Path:
    """Creates the directory of a new run and writes its config.json.

    Raises:
      ConfigError: if it cannot be written.
    """
    name = f"seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent = logdir / game / preset
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = _new_directory(parent, name)
        scores.write(directory / CONFIG, {"id": uuid.uuid4().hex, **describe(game, preset, config)})
    except OSError as error:
        raise ConfigError(f"--logdir {logdir}: cannot be written to ({error.strerror or error})") from error
    return directory


def _new_directory(parent: pathlib.Path, name: str) -> pathlib.Path:
    """Two runs started in the same second get different directories."""
    for count in range(1, 1000):
        path = parent / (name if count == 1 else f"{name}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise OSError(f"{parent / name} and 999 more exist")


def describe(game: str, preset: str, config: RunSettings) -> dict[str, Any]:
    """What reproduces a run: game, preset, resolved configuration, versions, device, commit."""
    return {"game": game, "preset": preset, "config": dataclasses.asdict(config), **environment()}


@contextlib.contextmanager
def lock(directory: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from writing to a run directory; the system lets go of it even if this one is killed.

    Raises:
      ConfigError: another process holds it, or the directory cannot be written to.
    """
    import fcntl

    path = directory / "lock"
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written to ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{directory} is in use by {file.read().strip() or 'another process'}; wait for it to end, or start "
                f"a run of its own with --no-resume"
            ) from None
        with contextlib.suppress(OSError):  # a full disk does not matter here
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def load_config(directory: pathlib.Path) -> tuple[str, RunConfig]:
    """The game and the resolved configuration of a run of Atari, from its config.json; see `load_any_config`.

    Raises:
      ConfigError: likewise, or it is a run of something else.
    """
    game, config = load_any_config(directory)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{directory} is a run of {game}; this is for runs of Atari")
    return game, config


def load_any_config(directory: pathlib.Path) -> tuple[str, RunConfig | TaskRunConfig]:
    """The game, or task of EnvPool, and the resolved configuration of a run, from its config.json.

    Raises:
      ConfigError: if `directory` is no run directory, or its configuration is not one that this version knows.
    """
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        game, values = content["game"], content["config"]
        if not isinstance(game, str):
            raise TypeError(f"game is {game!r}")
        kind = TaskRunConfig if isinstance(values, dict) and "task" in values else RunConfig
        return game, _from_dict(kind, values)
    except OSError as error:
        raise ConfigError(f"{directory} is no run directory: cannot read {path} ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ConfigError) else error
        raise ConfigError(f"{path} was not written by this version of drama_jax ({reason})") from error


def _from_dict(kind: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """The inverse of `dataclasses.asdict` after a trip through JSON, where tuples have become lists.

    `path` is where `values` lie in the run's configuration. Fields that are missing must be in `LATER`.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {str(values)[:40]!r}")
    types = typing.get_type_hints(kind)
    values = {name: LATER[path + name] for name in types if path + name in LATER} | values
    if different := types.keys() ^ values.keys():
        raise KeyError(f"{kind.__name__}: {', '.join(sorted(map(str, different)))}")

    def build(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(types[name]):
            return _from_dict(types[name], value, f"{path}{name}/")
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: build(name, value) for name, value in values.items()})


def environment() -> Mapping[str, Any]:
    """Versions of Python and the packages that matter, device, XLA's flags, and the commit of the source if known."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
