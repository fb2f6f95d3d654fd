"""How scores are written in tables, and which published columns stand beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

REFERENCES = ("random", "human")
BESIDE = {"Drama_XS": "Drama", "DreamerV3": "DreamerV3", "STORM": "STORM"}
"""Columns of `scores.table()` that the short tables show, and their heads."""


def score(value: float | None) -> str:
    """A raw score; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and standard error; the mean alone of one value; empty for none."""
    if not values:
        return ""
    error = standard_error(values)
    return score(float(np.mean(values))) + ("" if error is None else f" ± {score(error)}")


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
