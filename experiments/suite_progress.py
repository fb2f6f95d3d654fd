"""How far the tasks of a suite are, from their run directories."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from drama_jax.config import RunConfig
from drama_jax.training import resume
from experiments import runs, suite_worker
from experiments.atari_options import AllOptions
from experiments.sweep import Planned

_TAIL_BYTES = 65_536


@dataclasses.dataclass
class Task:
    """The agents of a game that share a process."""

    options: AllOptions
    game: str
    seeds: range
    arguments: tuple[str, ...]
    planned: list[Planned[RunConfig]]
    outcome: str | None = None
    """How it has ended."""
    returns: dict[pathlib.Path, float] = dataclasses.field(default_factory=dict)
    """Run -> the last return found in its metrics."""

    @property
    def name(self) -> str:
        """Of its files."""
        last = f"-{self.seeds[-1]}" if len(self.seeds) > 1 else ""
        return f"{self.game}-{self.options.preset}-seed{self.seeds[0]}{last}"

    @property
    def label(self) -> str:
        """For a sentence."""
        return f"{self.game}, {'seeds' if len(self.seeds) > 1 else 'seed'} {self.seeds_text}"

    @property
    def seeds_text(self) -> str:
        """First and last."""
        return f"{self.seeds[0]}-{self.seeds[-1]}" if len(self.seeds) > 1 else str(self.seeds[0])

    @property
    def logs(self) -> pathlib.Path:
        """The directory of the suite's own files."""
        return self.options.logdir / "suite"

    @property
    def log(self) -> pathlib.Path:
        """What its processes print."""
        return self.logs / f"{self.name}.log"

    @property
    def state_file(self) -> pathlib.Path:
        """There while it is running."""
        return self.logs / f"{self.name}.running"

    @property
    def done(self) -> bool:
        """Whether all its agents are finished."""
        return not suite_worker.parts(self.options, self.game, self.planned)

    def scores(self) -> list[tuple[int, str | None, float | None]]:
        """Seed, run directory and mean score of every agent; None where there is none."""
        rows: list[tuple[int, str | None, float | None]] = []
        for one in self.planned:
            directory = runs.finished(self.options, self.game, one)
            if directory is None:
                rows.append((one.config.seed, None, None))
            else:
                mean = json.loads((directory / "scores.json").read_text(encoding="utf-8"))["mean"]
                rows.append((one.config.seed, str(directory), mean))
        return rows

    def last_error(self) -> str | None:
        """The last error that its processes printed."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return None
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)

    def progress(self) -> tuple[int, float | None]:
        """Steps done by the agent that has done least, and the mean of the agents' last training returns."""
        steps, returns = [], []
        for one in self.planned:
            runs = resume.runs(self.options.logdir, self.game, self.options.preset, one.config)
            newest = max(runs, key=lambda path: path.name, default=None)
            steps.append(0 if newest is None else self._look(newest))
            if newest in self.returns:
                returns.append(self.returns[newest])
        return min(steps), sum(returns) / len(returns) if returns else None

    def _look(self, run: pathlib.Path) -> int:
        """The last step in the metrics of a run; notes the last return."""
        step = 0
        for line in _tail(run / "metrics.jsonl"):
            try:
                values = json.loads(line)
                step = max(step, values["step"])
                self.returns[run] = float(values["charts/episodic_return"])
            except (ValueError, KeyError, TypeError):
                continue  # of something else, or being written
        return step

    def state(self, step: int) -> str:
        """In a word or three."""
        if self.outcome is not None:
            return self.outcome
        attempt = suite_worker.read(self.state_file).get("attempt", 0)
        if not attempt:
            return "waiting"
        doing = "evaluating" if step >= self.options.steps else "running"
        return doing if attempt == 1 else f"{doing}, attempt {attempt}"


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
                    print(_HEAD, file=self._stream)
                print(line, file=self._stream, flush=True)
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
        print(up + "\x1b[J" + "\n".join(lines), file=self._stream, flush=True)
        self._drawn = len(lines)


_HEAD = f"{'game':<16}{'seeds':>7}{'step':>18}{'last return':>14}  state"
_WORDS = ("finished", "failed", "stopped", "evaluating", "running", "waiting")


def _tail(path: pathlib.Path) -> list[bytes]:
    """The last lines of a file; the first of them may be cut off."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []
