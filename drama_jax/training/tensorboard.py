"""TensorBoard events, written by the calling thread.

tensorboardX's own writer has a thread that ends when the disk is full; the next calls then wait for ever.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

_FLUSH_SECONDS = 60.0


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """As if PyTorch were not installed.

    tensorboardX imports it if it can, for tensors that it is never given here. That takes seconds, and loads CUDA
    libraries beside those of JAX.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # what Python takes for "cannot be imported"
    try:
        yield
    finally:
        del sys.modules["torch"]


class Board:
    """One event file in `directory`.

    Args:
      directory: Created if it is not there.
      start: Agent steps done before; events of later steps in earlier files are hidden by TensorBoard.

    Raises:
      OSError: from every method, if the file cannot be written; the next call begins another one.
    """

    def __init__(self, directory: pathlib.Path, start: int = 0) -> None:
        with _without_torch():
            import tensorboardX  # noqa: F401 (its modules are imported below)

        self._directory, self._start = directory, start
        self._writer: Any = None
        self._flushed = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point per tag."""
        from tensorboardX.summary import scalar

        for tag, value in values.items():
            self._write(step, summary=scalar(tag, value))

    def image(self, step: int, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """An RGB image of `size` (height, width), encoded already: that takes longer than all else here."""
        from tensorboardX.proto.summary_pb2 import Summary

        height, width = size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        try:
            if self._writer is None:
                self._open()
            self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
            if time.monotonic() > self._flushed + _FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.close()
            raise

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._directory.mkdir(exist_ok=True)
        # Two files may begin in one second, which is all that their names would tell; they are read in this order.
        suffix = f".{sum(1 for _ in self._directory.iterdir()):04d}"
        self._writer = EventsWriter(str(self._directory / "events"), suffix)
        if self._start:
            log = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=self._start + 1, wall_time=time.time(), session_log=log))
            self._start = 0  # once is enough
