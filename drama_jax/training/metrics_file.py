"""metrics.jsonl of a run directory, which `logging.Writer` appends to: read, and cut where a run goes on.

Every line is a JSON object with `step`, the agent steps done, and scalars by tag. Lines have `seconds` too, of training
so far, but for those that older versions wrote.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from drama_jax.config import ConfigError
from drama_jax.training import files

NAME = "metrics.jsonl"
CUT = "metrics-cut.jsonl"


def read(run: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last one that was cut off when the machine went down is left out.

    Raises:
      ConfigError: the file cannot be read, or has a line of something else.
    """
    path = run / NAME
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    rows = [_parsed(line) for line in lines]
    if rows and rows[-1] is None and not lines[-1].endswith(b"\n"):
        rows.pop()
    if None in rows:
        raise ConfigError(f"{path}: line {rows.index(None) + 1} is damaged; remove it to use the others")
    return [row for row in rows if row is not None]


def cut(run: pathlib.Path, step: int) -> None:
    """Moves the lines that come after `step`, and are written again now, to metrics-cut.jsonl.

    An evaluation of `step` counts as later, unless its scores are there.

    Raises:
      ConfigError: the files cannot be written.
    """
    path = run / NAME
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        scored = (run / f"scores-{step}.json").exists()
        kept = [_is_kept(line, step, scored) for line in lines]
        if not all(kept):
            _append(run / CUT, b"".join(line for line, keep in zip(lines, kept) if not keep))
            files.write(path, b"".join(line for line, keep in zip(lines, kept) if keep))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written to ({error.strerror})") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
        return None
    return row


def _is_kept(line: bytes, step: int, scored: bool) -> bool:
    row = _parsed(line)
    if row is None or not line.endswith(b"\n"):
        return False
    evaluated = any(tag.startswith("eval/") for tag in row)
    return bool(row["step"] < step or (row["step"] == step and (scored or not evaluated)))


def _append(path: pathlib.Path, content: bytes) -> None:
    """On the disk when this returns: what is moved is there twice for a moment, never not at all."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
