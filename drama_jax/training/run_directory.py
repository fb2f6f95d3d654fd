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
import os
import pathlib
import platform
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from drama_jax.config import ConfigError
from drama_jax.training import config_file, scores
from drama_jax.training.config_file import RunSettings

_PACKAGES = ("drama_jax", "jax", "jaxlib", "flax", "optax", "chex", "numpy", "orbax-checkpoint", "envpool", "ale-py")


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
        scores.write(directory / config_file.NAME, {"id": uuid.uuid4().hex, **describe(game, preset, config)})
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
