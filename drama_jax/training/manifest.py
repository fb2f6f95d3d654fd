"""Which files make up a checkpoint: <run>/checkpoints/<step>/manifest.json.

It names every file with its size and SHA-256, those of the checkpoint's own directory and the replay segments it needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from drama_jax.training import files

FORMAT = 1
"""Version of what a checkpoint consists of."""
NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a manifest."""

    step: int
    """Agent steps taken."""
    end: int
    """Steps the replay had been given."""
    run: str
    """Identity of the run, from its config.json."""
    files: dict[str, dict[str, Any]]
    """Path in the checkpoint's directory -> {"size", "sha256"}."""
    segments: dict[str, dict[str, Any]]
    """Path in the run directory -> {"size", "sha256"}, in order."""


class Invalid(Exception):  # noqa: N818 - not always an error
    """Why a checkpoint cannot be used, naming the file."""


def write(directory: pathlib.Path, step: int, end: int, run: str, segments: dict[str, dict[str, Any]]) -> None:
    """Describes the files in `directory`, and writes that there."""
    described = {name: files.describe(directory / name, sync=True) for name in _names(directory)}
    content = {"format": FORMAT, **dataclasses.asdict(Manifest(step, end, run, described, segments))}
    content["sha256"] = _digest(content)
    files.write(directory / NAME, (json.dumps(content, indent=1) + "\n").encode())


def read(directory: pathlib.Path) -> Manifest:
    """The manifest of the checkpoint in `directory`.

    Raises:
      Invalid: it is missing, damaged, or of another version.
    """
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
        version, digest = content["format"], content.pop("sha256", None)
        if version == FORMAT:
            if digest != _digest(content):
                raise Invalid(f"{NAME} has been changed (its SHA-256 differs)")
            del content["format"]
            return _checked(Manifest(**content))
    except FileNotFoundError:
        raise Invalid(f"{NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Invalid(f"{NAME} is damaged ({type(error).__name__}: {error})") from error
    if isinstance(version, int) and version > FORMAT:
        raise Invalid(f"{NAME} has format {version} of a newer drama_jax; this one reads {FORMAT}: update drama_jax")
    raise Invalid(f"{NAME} has format {version!r} of an older drama_jax; this one reads {FORMAT}: use that version")


def verify(directory: pathlib.Path, run: pathlib.Path | None = None, identity: str | None = None) -> Manifest:
    """Reads every file of a checkpoint and compares it with the manifest.

    Args:
      directory: The checkpoint.
      run: The run directory, for the replay segments; None to leave these out.
      identity: The identity of the run that the checkpoint must belong to; None for any.

    Raises:
      Invalid: naming the first file that is missing, truncated, changed or foreign.
    """
    manifest = read(directory)
    if str(manifest.step) != directory.name:
        raise Invalid(f"{NAME} belongs to step {manifest.step}")
    if identity is not None and manifest.run != identity:
        raise Invalid(f"{NAME} belongs to another run")
    try:
        _compare(directory, manifest.files)
        for name in _names(directory):
            if name not in manifest.files:
                raise Invalid(f"{name if name.isprintable() else repr(name)} does not belong to it")
        if run is not None:
            _compare(run, manifest.segments)
    except OSError as error:
        raise Invalid(f"{error.filename} cannot be read ({error.strerror})") from error
    return manifest


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's own content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked(manifest: Manifest) -> Manifest:
    numbers, tables = (manifest.step, manifest.end), (manifest.files, manifest.segments)
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(manifest.run, str):
        raise ValueError("step, end or run is of the wrong type")
    for table in tables:
        if not all({"size", "sha256"} <= description.keys() for description in table.values()):
            raise ValueError("a file is described without size or sha256")
    return manifest


def _compare(root: pathlib.Path, wanted: dict[str, dict[str, Any]]) -> None:
    for name, description in wanted.items():
        path = root / name
        if not path.is_file():
            raise Invalid(f"{name} is missing")
        size = path.stat().st_size
        if size != description["size"]:
            raise Invalid(f"{name} has {size} bytes, not {description['size']}")
        if files.describe(path)["sha256"] != description["sha256"]:
            raise Invalid(f"{name} has been changed (its SHA-256 differs)")


def _names(directory: pathlib.Path) -> Iterable[str]:
    paths = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return [str(path.relative_to(directory)) for path in paths if path != directory / NAME]
