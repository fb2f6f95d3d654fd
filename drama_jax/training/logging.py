"""What a run writes while it goes on: metrics.jsonl, TensorBoard events, images, and a progress bar.

Tags follow cleanrl and the released Drama: `charts/episodic_return`, `charts/SPS`, `world_model/...`,
`actor_critic/...`, `replay/...`, `dfs/...`. The x axis is the number of agent steps, never emulator frames.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.config import LoggingConfig
from drama_jax.training import files, metrics_file
from drama_jax.training.tensorboard import Board


class MeanMetrics:
    """Means of scalar metrics over an interval, summed on the device and fetched once."""

    def __init__(self) -> None:
        self.sums: dict[str, jax.Array] | None = None
        self.count = 0

    @staticmethod
    def saved(saved: Mapping[str, np.ndarray], prefix: str) -> dict[str, jax.Array] | None:
        """The sums that were saved under `prefix`; None if nothing had been added."""
        names = (name for name in saved if name.startswith(prefix))
        return {name.removeprefix(prefix): jnp.array(saved[name]) for name in names} or None

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds one update's metrics without waiting for them."""
        self.sums = metrics if self.sums is None else _add(self.sums, metrics)
        self.count += 1

    def fetch(self) -> dict[str, np.ndarray]:
        """Means since the last call, float64; waits for the device. Empty if nothing was added."""
        if self.sums is None:
            return {}
        means = {tag: np.asarray(total, np.float64) / self.count for tag, total in jax.device_get(self.sums).items()}
        self.sums, self.count = None, 0
        return means


@jax.jit
def _add(sums: dict[str, jax.Array], metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, sums, metrics)


class Writer:
    """Writes scalars and images of one run. Use as a context manager, or call `close`.

    Images may be written by another thread than scalars.
    A disk that is full stops no run: it is reported once, lines wait in memory until they can be written, and what
    TensorBoard and the images miss meanwhile stays missing.

    Args:
      directory: The run directory.
      config: Whether TensorBoard events are written.
      start: Agent steps done before; in TensorBoard, events of later steps are hidden.
      say: Shows a message to the user.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: LoggingConfig,
        *,
        start: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self._directory, self._say = directory, say
        self._lines = (directory / metrics_file.NAME).open("ab", buffering=0)
        self._waiting = b""
        self._failing = False
        self._lock = threading.Lock()  # of the board
        self._board = Board(directory / "tensorboard", start) if config.tensorboard else None

    def scalars(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point per tag. A number that is not finite becomes null in the JSON.

        Args:
          step: Agent steps done.
          seconds: Of training so far, as `clock.Clock` counts them; lines of older versions lack them.
          values: By tag.
        """
        finite = {tag: float(value) if math.isfinite(value) else None for tag, value in values.items()}
        line = {"step": step, "seconds": round(seconds, 3), **finite}
        self._waiting += (json.dumps(line) + "\n").encode()
        with self._tolerant():
            while self._waiting:
                self._waiting = self._waiting[self._lines.write(self._waiting) :]
            if self._board is not None:
                with self._lock:
                    self._board.scalars(step, values)
            self._failing = False

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """`image` uint8 [height, width, 3], to images/<tag>-<step>.png and TensorBoard."""
        from PIL import Image

        path = self._directory / "images" / f"{tag.replace('/', '-')}-{step:07d}.png"
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        with self._tolerant():
            path.parent.mkdir(exist_ok=True)
            files.write(path, encoded.getvalue())
            if self._board is not None:
                with self._lock:
                    self._board.image(step, tag, encoded.getvalue(), image.shape[:2])

    def arrays(self, step: int, name: str, arrays: Mapping[str, np.ndarray]) -> pathlib.Path | None:
        """Writes `arrays` to <name>-<step>.npz and returns the path; None if it cannot be written."""
        written: list[pathlib.Path] = []
        with self._tolerant():
            path = self._directory / f"{name}-{step:07d}.npz"
            files.write(path, files.pack(arrays))
            written.append(path)
        return written[0] if written else None

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        if self._board is not None:
            with self._tolerant():
                self._board.close()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._say(f"the log in {self._directory} cannot be written ({error.strerror or error}); going on")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say(message: str, stream: TextIO | None = None) -> None:
    """Prints a line, on standard error if not told otherwise, and goes on where nobody can read it any more."""
    with contextlib.suppress(OSError):  # the terminal, or the program behind a pipe, has gone
        print(message, file=sys.stderr if stream is None else stream, flush=True)


class Progress:
    """A progress bar on standard error: step (or another `unit`), steps/s, time left, last return."""

    def __init__(self, total: int, enabled: bool, description: str, initial: int = 0, unit: str = "step") -> None:
        self._bar: Any = None
        self._enabled = enabled
        if enabled:
            from tqdm import tqdm

            # A file gets a line now and then, a terminal a bar that moves.
            interval = 0.2 if sys.stderr.isatty() else 10.0
            with contextlib.suppress(OSError):  # as in `say`
                self._bar = tqdm(
                    total=total, desc=description, unit=unit, mininterval=interval, dynamic_ncols=True, initial=initial
                )

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # as in `say`
                self._bar.update(1)

    @contextlib.contextmanager
    def part(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A bar of its own, drawn when the function given back is first called with (steps done, steps in all)."""
        bars: list[Progress] = []

        def on_step(done: int, total: int) -> None:
            if not bars:
                bars.append(Progress(total, self._enabled, description, done - 1))
            bars[0].advance()

        yield on_step
        for bar in bars:
            bar.close()

    def show(self, **values: str) -> None:
        """Shows values at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._bar is None:
            say(message)
            return
        with contextlib.suppress(OSError):
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
