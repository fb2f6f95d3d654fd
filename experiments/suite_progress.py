"""The table of a suite's tasks while they run."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from drama_jax.training.logging import say
from experiments.suite_task import Task


class Progress:
    """The table of all tasks: redrawn on a terminal, elsewhere a line for each change."""

    _EVERY_S = 2.0
    _REPEAT_S = 60.0

    def __init__(self, tasks: Sequence[Task], stream: TextIO | None = None) -> None:
        self._tasks = tasks
        self._stream = sys.stdout if stream is None else stream
        self._rows: dict[str, tuple[str, str, float]] = {}
        self._drawn, self._due = 0, 0.0
        for task in tasks:
            if task.done:
                task.outcome = "finished"

    def show(self) -> None:
        """Shows where the tasks are, if the last time is long enough ago."""
        if time.monotonic() >= self._due:
            self._show()

    def _show(self) -> None:
        self._due = time.monotonic() + self._EVERY_S
        rows = [self._row(task) for task in self._tasks]
        if self._stream.isatty():
            self._draw(rows)
        else:
            self._write(rows)

    def close(self) -> None:
        """Shows where they are at the end, and leaves it there."""
        self._show()

    def _row(self, task: Task) -> tuple[str, str, str]:
        """Name, state, line."""
        kept = self._rows.get(task.name)
        if kept is not None and task.outcome is not None and kept[0] == task.outcome:
            return task.name, kept[0], kept[1]
        step, last = task.progress()
        state = task.state(step)
        value = "-" if last is None else f"{last:,.1f}"
        line = f"{task.game:<16}{task.seeds_text:>7}{f'{step:,}/{task.options.steps:,}':>18}{value:>14}  {state}"
        return task.name, state, line

    def _write(self, rows: Sequence[tuple[str, str, str]]) -> None:
        now = time.monotonic()
        for name, state, line in rows:
            kept = self._rows.get(name)
            due = kept is None or kept[0] != state or (kept[1] != line and now - kept[2] > self._REPEAT_S)
            if due:
                if not self._rows:
                    say(_HEAD, self._stream)
                say(line, self._stream)
                self._rows[name] = state, line, now

    def _draw(self, rows: Sequence[tuple[str, str, str]]) -> None:
        size = shutil.get_terminal_size()
        for name, state, line in rows:
            self._rows[name] = state, line, 0.0
        counts = {word: sum(state.startswith(word) for _, state, _ in rows) for word in _WORDS}
        summary = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        fit = size.lines - 3
        quiet = ("waiting", "finished")
        shown = rows if len(rows) <= fit else [row for row in rows if row[1] not in quiet][:fit]
        lines = [line[: size.columns - 1] for line in (_HEAD, *(line for *_, line in shown), f"{summary}")]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        say(up + "\x1b[J" + "\n".join(lines), self._stream)
        self._drawn = len(lines)


_HEAD = f"{'game':<16}{'seeds':>7}{'step':>18}{'last return':>14}  state"
_WORDS = ("finished", "failed", "stopped", "evaluating", "running", "waiting")
