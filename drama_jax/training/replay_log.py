"""The replay on disk: <run>/replay/<from>-<to>.npz, immutable segments of consecutive steps.

A save writes only the steps that came since the last one, from the host's memory. Steps are numbered from the start of
the run in the order the agent was given them; step n lies in slot n % capacity of the ring.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from drama_jax import checks
from drama_jax.config import ConfigError
from drama_jax.replay import Replay
from drama_jax.training import files

_FOLDER = "replay"


class Row(NamedTuple):
    """One step, with the environment axis E = 1."""

    frames: np.ndarray  # [1, H, W, C] uint8, or [1, O] float32
    actions: np.ndarray  # [1] int32, or [1, A] float32
    rewards: np.ndarray  # [1] float32
    terminals: np.ndarray  # [1] bool
    firsts: np.ndarray  # [1] bool


@dataclasses.dataclass(frozen=True)
class Segment:
    """A file of steps start <= n < stop."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its path in the run directory."""
        return f"{_FOLDER}/{self.start}-{self.stop}.npz"


class ReplayLog:
    """What the replay was given: segments on disk, and newer rows in memory.

    `add` may be called while another thread is in `flush`.

    Args:
      run: The run directory.
      capacity: N, how many steps the ring holds.
      segments: Those that are on disk already, in order.
    """

    def __init__(self, run: pathlib.Path, capacity: int, segments: list[Segment]) -> None:
        self._run, self._capacity = run, capacity
        self._rows: list[Row] = []
        self.segments = segments

    @property
    def end(self) -> int:
        """How many steps there are in all."""
        return self._on_disk + len(self._rows)

    @property
    def _on_disk(self) -> int:
        return self.segments[-1].stop if self.segments else 0

    def add(self, row: Row) -> None:
        """Remembers a step until the next flush; its arrays must not change any more."""
        self._rows.append(row)

    def flush(self, end: int) -> list[Segment]:
        """Writes the steps before `end` that are not on disk yet; returns the segments that the ring at `end` needs.

        Raises:
          OSError: they cannot be written; they stay in memory.
        """
        start = self._on_disk
        if end > start:
            rows = self._rows[: end - start]
            columns = {name: np.concatenate(column) for name, column in zip(Row._fields, zip(*rows))}
            segment = Segment(start, end)
            path = self._run / segment.name
            path.parent.mkdir(exist_ok=True)
            files.write(path, files.pack(columns))
            # In this order: at no time is a row missing from both, and only the owner of `flush` looks at both.
            self.segments = [*self.segments, segment]
            del self._rows[: end - start]
        self.segments = [segment for segment in self.segments if segment.stop > end - self._capacity]
        return self.segments

    def remove_except(self, needed: set[str]) -> None:
        """Removes the segments whose names are not in `needed`."""
        for path in (self._run / _FOLDER).glob("*"):
            if f"{_FOLDER}/{path.name}" not in needed and not path.is_dir():
                path.unlink(missing_ok=True)


def parse_name(name: str) -> Segment | None:
    """The segment of a path in the run directory; None for another file's."""
    folder, _, stem = name.removesuffix(".npz").partition("/")
    start, _, stop = stem.partition("-")
    return Segment(int(start), int(stop)) if folder == _FOLDER and start.isdecimal() and stop.isdecimal() else None


def without_rows(replay: Any) -> Any:
    """The replay less its rows: counters, position and size."""
    return dataclasses.replace(replay, **dict.fromkeys(Row._fields))


def with_rows(run: pathlib.Path, segments: list[Segment], end: int, replay: Any, like: Replay) -> Replay:
    """The ring as it was after `end` steps.

    Args:
      run: The run directory.
      segments: Those of the checkpoint; verified.
      end: How many steps the replay had been given.
      replay: The replay `without_rows`, restored.
      like: Shapes and types of the rows; may hold `jax.ShapeDtypeStruct`.

    Raises:
      ConfigError: a segment cannot be read, or its rows are not those of this configuration.
    """
    ring = {name: np.zeros(getattr(like, name).shape, getattr(like, name).dtype) for name in Row._fields}
    capacity = ring["actions"].shape[0]
    for segment in segments:
        rows = _rows(run, segment, ring)
        oldest = max(segment.start, end - capacity)
        slots = np.arange(oldest, segment.stop) % capacity
        for name, array in ring.items():
            array[slots] = rows[name][oldest - segment.start :]
    # One array after the other, so that host and device together hold the frames once and a little.
    return dataclasses.replace(replay, **{name: jnp.array(ring.pop(name)) for name in Row._fields})


def _rows(run: pathlib.Path, segment: Segment, ring: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of a segment, which fit the ring."""
    try:
        rows = files.unpack(run / segment.name)
        for name, array in ring.items():
            shape = (segment.stop - segment.start, *array.shape[1:])
            checks.arrays("rows", **{name: (rows[name], shape, str(array.dtype))})
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{run / segment.name} cannot be used ({type(error).__name__}: {error})") from error
    return rows
