"""Reference scores, the human-normalised score, and the files and tables that report a run's result."""

from __future__ import annotations

import csv
import functools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from drama_jax import checks


@functools.cache
def table() -> Mapping[str, Mapping[str, float]]:
    """game -> column -> mean raw score, of the 26 Atari100k games.

    Columns `random` and `human` are there for every game; a published method's column only where its score is verified.
    Sources: data/SOURCES.md.
    """
    text = resources.files("drama_jax.training").joinpath("data/atari100k_scores.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["game"]: {name: float(cell) for name, cell in row.items() if name != "game" and cell} for row in rows}


def human_normalised(game: str, score: float) -> float | None:
    """(score - random) / (human - random); None for a game without reference scores."""
    checks.instances("human_normalised", game=(game, str))
    checks.numbers("human_normalised", -sys.float_info.max, sys.float_info.max, score=score)
    references = table().get(game)
    if references is None:
        return None
    return (score - references["random"]) / (references["human"] - references["random"])


def summary(game: str, returns: Sequence[float]) -> dict[str, Any]:
    """Per-episode returns (undiscounted raw sums over whole games) with their mean and human-normalised mean."""
    _check(game, returns)
    mean = float(np.mean(returns)) if returns else None
    return {
        "evaluation_returns": [float(value) for value in returns],
        "mean": mean,
        "human_normalised": None if mean is None else human_normalised(game, mean),
    }


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as JSON; a reader sees the old file or the whole new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def format_table(game: str, returns: Sequence[float]) -> str:
    """The score table for the terminal: random play, a human, published Drama where verified, and this run."""
    _check(game, returns)
    references = table().get(game, {})
    rows: list[tuple[str, float | None]] = [
        ("random", references.get("random")),
        ("human", references.get("human")),
        ("Drama XS, published", references.get("Drama_XS")),
        ("this run", float(np.mean(returns)) if returns else None),
    ]
    lines = [f"{game:<22}{'score':>12}{'human-normalised':>20}"]
    for name, score in rows:
        if score is None:
            continue
        normalised = human_normalised(game, score)
        lines.append(f"{name:<22}{score:>12,.2f}{'-' if normalised is None else f'{normalised:.3f}':>20}")
    if returns:
        spread = f"{len(returns)} episodes, lowest {min(returns):,.0f}, highest {max(returns):,.0f}"
        lines.append(f"{'':<22}{spread:>32}")
    return "\n".join(lines)


def _check(game: str, returns: Sequence[float]) -> None:
    checks.instances("scores", game=(game, str), returns=(returns, (list, tuple)))
    for index, value in enumerate(returns):
        checks.numbers("scores", -sys.float_info.max, sys.float_info.max, **{f"returns[{index}]": value})
