"""A task of a suite: the agents of a game that share a process, and how far they are, from their run directories."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from drama_jax.config import RunConfig
from drama_jax.training import metrics_file, resume
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
                content = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
                rows.append((one.config.seed, str(directory), content.get("mean")))
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
            directories = resume.runs(self.options.logdir, self.game, self.options.preset, one.config)
            newest = max(directories, key=lambda path: path.name, default=None)
            steps.append(0 if newest is None else self._look(newest))
            if newest in self.returns:
                returns.append(self.returns[newest])
        return min(steps), sum(returns) / len(returns) if returns else None

    def _look(self, run: pathlib.Path) -> int:
        """The last step in the metrics of a run; notes the last return."""
        step = 0
        for line in _tail(run / metrics_file.NAME):
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


def _tail(path: pathlib.Path) -> list[bytes]:
    """The last lines of a file; the first of them may be cut off."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().splitlines()
    except OSError:
        return []
