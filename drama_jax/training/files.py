"""Files that are there whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import shutil
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

PARTIAL = ".partial"
"""Ending of what is still being written; a process that finds it may remove it."""


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file; a reader, or a machine that loses power, sees the old content or the whole new one.

    Raises:
      OSError: it cannot be written; the old content stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def rename(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a directory, for good."""
    source.rename(target)
    sync_directory(target.parent)


def remove_directory(path: pathlib.Path) -> None:
    """Removes a directory in such a way that what is left after an interruption is marked as partial."""
    if path.suffix != PARTIAL:
        # Not `<name>.partial`: that may be what is to take its place.
        old = path.with_name(f"{path.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        path = path.rename(old)
    shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: pathlib.Path) -> None:
    """Makes renames in a directory last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(path: pathlib.Path, *, sync: bool = False) -> dict[str, Any]:
    """{"size", "sha256"} of a file; with `sync` it is on the disk when this returns."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest}


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays as an .npz file, compressed fast rather than well; arrays of objects are refused.

    Raises:
      ValueError: an array holds Python objects, which could only be pickled.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return file.getvalue()


def unpack(content: bytes | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of `pack`, from memory or from a file. Executes nothing: pickled objects are refused.

    Raises:
      ValueError: the content is no such file.
    """
    try:
        with np.load(io.BytesIO(content) if isinstance(content, bytes) else content, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"not an .npz file of plain arrays: {error}") from error
