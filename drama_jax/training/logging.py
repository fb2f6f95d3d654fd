"""What a run writes while it goes on: metrics.jsonl, TensorBoard events, images, and a progress bar.

Tags follow cleanrl and the released Drama: `charts/episodic_return`, `charts/SPS`, `world_model/...`,
`actor_critic/...`, `replay/...`, `dfs/...`. The x axis is the number of agent steps, never emulator frames.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.config import LoggingConfig


class MeanMetrics:
    """Means of scalar metrics over an interval, summed on the device and fetched once."""

    def __init__(self) -> None:
        self._sums: dict[str, jax.Array] | None = None
        self._count = 0

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds one update's metrics without waiting for them."""
        self._sums = metrics if self._sums is None else _add(self._sums, metrics)
        self._count += 1

    def fetch(self) -> dict[str, float]:
        """Means since the last call; waits for the device. Empty if nothing was added."""
        if self._sums is None:
            return {}
        means = {tag: float(total) / self._count for tag, total in jax.device_get(self._sums).items()}
        self._sums, self._count = None, 0
        return means


@jax.jit
def _add(sums: dict[str, jax.Array], metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.add, sums, metrics)


class Writer:
    """Writes scalars and images of one run. Use as a context manager, or call `close`."""

    def __init__(self, directory: pathlib.Path, config: LoggingConfig) -> None:
        self._directory = directory
        self._lines = (directory / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board: Any = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point per tag. A number that is not finite becomes null in the JSON."""
        finite = {tag: float(value) if math.isfinite(value) else None for tag, value in values.items()}
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """`image` uint8 [height, width, 3], to images/<tag>-<step>.png and TensorBoard."""
        from PIL import Image

        path = self._directory / "images" / f"{tag.replace('/', '-')}-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        if self._board is not None:
            self._board.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress:
    """A progress bar on standard error: step, steps/s, time left, last return."""

    def __init__(self, total: int, enabled: bool, description: str) -> None:
        self._bar: Any = None
        if enabled:
            from tqdm import tqdm

            # A file gets a line now and then, a terminal a bar that moves.
            interval = 0.2 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(total=total, desc=description, unit="step", mininterval=interval, dynamic_ncols=True)

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update(1)

    def show(self, **values: str) -> None:
        """Shows values at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def comparison_strip(truth: np.ndarray, prediction: np.ndarray, gap: int = 2) -> np.ndarray:
    """Frames over their predictions over the absolute error, time from left to right.

    Args:
      truth: uint8 [B, T, H, W, C], C = 1 or 3.
      prediction: float [B, T, H, W, C] in [0, 1].
      gap: Pixels between frames; twice as many between sequences.

    Returns:
      uint8 [B * (3 (H + gap) + gap), T * (W + gap), 3].
    """
    predicted = np.clip(np.rint(prediction * 255.0), 0, 255).astype(np.uint8)
    error = np.abs(truth.astype(np.int16) - predicted).astype(np.uint8)
    rows = np.stack([truth, predicted, error], axis=1)
    rows = np.broadcast_to(rows, (*rows.shape[:-1], 3))
    rows = np.pad(rows, [(0, 0)] * 3 + [(0, gap)] * 2 + [(0, 0)])
    b, three, t, h, w, c = rows.shape
    sequences = rows.transpose(0, 1, 3, 2, 4, 5).reshape(b, three * h, t * w, c)
    return np.pad(sequences, [(0, 0), (0, gap), (0, 0), (0, 0)]).reshape(-1, t * w, c)
