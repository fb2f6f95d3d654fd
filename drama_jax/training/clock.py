"""How long a run has been trained, over all its parts."""

from __future__ import annotations

import time


class Clock:
    """Starts when it is made.

    Args:
      before: Seconds of earlier parts of the run, up to the checkpoint that this part goes on from.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self._start = time.perf_counter()

    @property
    def part(self) -> float:
        """Seconds of this part."""
        return time.perf_counter() - self._start

    @property
    def total(self) -> float:
        """Seconds of all parts; the time between them does not count."""
        return self.before + self.part
