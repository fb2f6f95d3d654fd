"""What the training loop writes about its agents besides checkpoints: episodes, metrics, images, and how fast it is."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax.config import AnyRunConfig
from drama_jax.training import images, watch
from drama_jax.training.clock import Clock
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.loop_state import LoopState, Seat
from drama_jax.training.programs import Programs
from drama_jax.training.together import Together

_MEASURED_UPDATES = 3


class Recorder:
    """Writes for all agents of a loop, each to its own writer.

    Args:
      config: Of the run.
      writers: One per agent.
      together: How the agents lie on the devices.
      programs: Those of the loop.
      progress: The progress bar.
      on_measured: See `loop.train_together`.
    """

    def __init__(
        self,
        config: AnyRunConfig,
        writers: Sequence[Writer],
        together: Together,
        programs: Programs,
        progress: Progress,
        on_measured: Callable[[float, int], str | None],
    ) -> None:
        self._config, self._writers, self._together, self._programs = config, writers, together, programs
        self._progress, self._on_measured = progress, on_measured
        self._interval_start = 0.0, 0  # (seconds of the run, step) at which the metrics interval began
        self._unmeasured = 0
        # Images take a second to encode, in which the loop would not step.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "images")
        self._images: concurrent.futures.Future[None] | None = None

    def begin(self, step: int, now: LoopState) -> None:
        """The loop begins at `step`, perhaps after earlier parts of the run."""
        self._interval_start = now.clock.before, step
        self._unmeasured = len(now.step_seconds)

    def episode(self, index: int, steps_done: int, seat: Seat, clock: Clock) -> None:
        """Logs an agent's episode that has just ended: its return and its agent steps."""
        values = {
            "charts/episodic_return": seat.episode_return,
            "charts/episodic_length": float(seat.episode_length),
        }
        self._writers[index].scalars(steps_done, clock.total, values)
        self._progress.show(last_return=f"{seat.episode_return:g}")

    def step(self, steps_done: int, state: Any, now: LoopState) -> None:
        """Writes metrics and images where they are due: at intervals and at the end.

        Raises:
          NotFiniteError: too many updates in a row were skipped.
        """
        logging, end = self._config.logging, steps_done == self._config.steps
        if end or steps_done % logging.metrics_every == 0:
            self._metrics(steps_done, state, now)
        images_due = not self._config.agent.world_model.autoencoder.vector_size and (
            end or steps_done % logging.images_every == 0
        )
        if images_due and now.fed > self._config.agent.warmup_steps:
            keys = [jax.random.fold_in(seat.image_key, steps_done) for seat in now.seats]
            pictures = self._programs.pictures(state, self._together.stack(keys))
            self._wait_for_images()
            self._images = self._thread.submit(self._write_images, steps_done, pictures)

    def _write_images(self, steps_done: int, pictures: Any) -> None:
        """In a thread of its own."""
        pictures = jax.device_get(pictures)
        for index, writer in enumerate(self._writers):
            images.write(writer, steps_done, *self._together.agent(pictures, index))

    def _wait_for_images(self) -> None:
        """Returns when no images are being written."""
        if self._images is not None:
            self._images.result()
            self._images = None

    def close(self) -> None:
        """Waits for the last images and ends their thread."""
        self._thread.shutdown()
        self._wait_for_images()

    def _metrics(self, steps_done: int, state: Any, now: LoopState) -> None:
        """One line of metrics per agent."""
        values = now.metrics.fetch() | jax.device_get(self._programs.metrics(state))
        seconds = now.clock.total
        then, step_then = self._interval_start
        self._interval_start = seconds, steps_done
        speed = {"charts/SPS": (steps_done - step_then) / (seconds - then)}
        own = [self._together.of_host(values, index) for index in range(self._together.count)]
        for writer, scalars in zip(self._writers, own):
            writer.scalars(steps_done, seconds, {tag: float(value) for tag, value in scalars.items()} | speed)
        for scalars in own:
            watch.check_skipped(float(scalars["guard/skipped_in_a_row"]), self._config.max_skipped_updates)

    def skipped_batches(self, steps_done: int, state: Any) -> str:
        """Writes the batches of skipped world-model updates; returns where they are, to be appended to a message."""
        paths = []
        for index, writer in enumerate(self._writers):
            batch = watch.skipped_batch(state, () if self._together.count == 1 else (index,))
            paths.append(None if batch is None else writer.arrays(steps_done, "not-finite", batch))
        written = [str(path) for path in paths if path is not None]
        return f"; their last batch is in {', '.join(written)}" if written else ""

    def estimate(self, steps_done: int, step_seconds: Sequence[float]) -> None:
        """Reports the speed once, after `_MEASURED_UPDATES` updates that compiled nothing."""
        seconds = step_seconds[self._unmeasured :]
        if len(seconds) == 1 + _MEASURED_UPDATES:
            message = self._on_measured(float(np.mean(seconds[1:])), self._config.steps - steps_done)
            if message:
                self._progress.say(message)
