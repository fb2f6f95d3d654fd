"""Writes checkpoints, in a thread of its own, while the loop goes on; see `checkpoint` for what they hold.

A checkpoint is written to `<step>.partial` and renamed when it is complete, so that a reader sees a whole one or none.
The last two are kept.
"""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Callable

import numpy as np

from drama_jax.training import files, manifest, orbax_arrays
from drama_jax.training.checkpoint import AGENT, FOLDER, LOOP, Snapshot, reason, steps_in
from drama_jax.training.manifest import Invalid
from drama_jax.training.replay_log import ReplayLog, Row, Segment

_KEPT = 2


class Checkpoints:
    """Writes the checkpoints of one run.

    Args:
      run: The run directory.
      identity: The run's identity, from its config.json.
      capacity: Steps the replay holds.
      segments: Replay segments that are on disk already.
      say: Shows a message to the user; may be called from another thread.
    """

    def __init__(
        self,
        run: pathlib.Path,
        identity: str,
        capacity: int,
        segments: list[Segment] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._run, self._identity, self._say = run, identity, say
        self._log = ReplayLog(run, capacity, segments or [])
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._running: concurrent.futures.Future[None] | None = None
        self.error: str | None = None
        """Why the last save failed; None if it did not."""
        self.saved: int | None = None
        """Step of the newest checkpoint that this process has written."""

    @property
    def problem(self) -> str | None:
        """That the last save failed, and why, for the user; None if it did not."""
        if self.error is None:
            return None
        return f"the last checkpoint of {self._run} could not be saved ({self.error})"

    def add(self, row: Row) -> None:
        """Remembers a step that the agent was given, for the next save."""
        self._log.add(row)

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint, once the previous one is written.

        A failure to write is shown and kept in `error`. The run's earlier checkpoints stay as they are.
        """
        self.wait()
        self._running = self._thread.submit(self._save, snapshot)

    def wait(self) -> None:
        """Returns when the last save has ended."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        self.wait()
        self._thread.shutdown()

    def _save(self, snapshot: Snapshot) -> None:
        try:
            _write(self._run, self._identity, self._log, snapshot)
        except (OSError, ValueError) as error:  # orbax reports a full disk as a ValueError
            self.error = reason(error)
            self._say(f"checkpoint {snapshot.step} could not be saved ({self.error}); the run goes on without it")
        else:
            self.error, self.saved = None, snapshot.step


def _write(run: pathlib.Path, identity: str, log: ReplayLog, snapshot: Snapshot) -> None:
    target = run / FOLDER / str(snapshot.step)
    partial = target.with_name(target.name + files.PARTIAL)
    for leftover in (run / FOLDER).glob("*" + files.PARTIAL):
        files.remove_directory(leftover)
    partial.mkdir(parents=True)
    try:
        segments = log.flush(snapshot.end)
        orbax_arrays.write(partial / AGENT, snapshot.device)
        header = np.frombuffer(json.dumps(snapshot.header).encode(), np.uint8)
        files.write(partial / LOOP, files.pack({"header": header, **snapshot.host}))
        described = {segment.name: files.describe(run / segment.name, sync=True) for segment in segments}
        manifest.write(partial, snapshot.step, snapshot.end, identity, described)
        if target.exists():  # one that was found damaged, and has been played again
            files.remove_directory(target)
        files.rename(partial, target)
    except (OSError, ValueError):
        files.remove_directory(partial)
        raise
    _remove_old(run, log)


def _remove_old(run: pathlib.Path, log: ReplayLog) -> None:
    for step in steps_in(run / FOLDER)[_KEPT:]:
        files.remove_directory(run / FOLDER / str(step))
    try:
        kept = [manifest.read(run / FOLDER / str(step)) for step in steps_in(run / FOLDER)]
    except Invalid:
        return  # it may still be told by hand what belongs to it
    log.remove_except({name for one in kept for name in one.segments})
