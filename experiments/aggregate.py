"""What the runs of several games come to together, with intervals that say how sure that is.

Mean, median and interquartile mean of human-normalised scores, and stratified bootstrap intervals, as in Agarwal et al.
2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264), section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from drama_jax.training import scores
from experiments.tables import BESIDE, REFERENCES, markdown_table, score, standard_error

RESAMPLES = 20_000
LEVEL = 0.95
Array = npt.NDArray[np.float64]
Scores = Mapping[str, Sequence[float]]
"""Game -> a score of every seed."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, and the interval in which it lies with a probability of `LEVEL`; None with one seed of a game only."""

    value: float
    interval: tuple[float, float] | None


def mean(samples: Sequence[Array]) -> Array:
    """Mean over games of the mean over seeds. Args: per game, (..., seeds). Returns: (...)."""
    return np.mean(_per_game(samples), axis=-1)


def median(samples: Sequence[Array]) -> Array:
    """Median over games of the mean over seeds. Args: per game, (..., seeds). Returns: (...)."""
    return np.median(_per_game(samples), axis=-1)


def interquartile_mean(samples: Sequence[Array]) -> Array:
    """Mean of the middle half of all runs of all games. Args: per game, (..., seeds). Returns: (...).

    Of n runs, the floor(n / 4) lowest and as many of the highest are left out.
    """
    runs = np.sort(np.concatenate(samples, axis=-1), axis=-1)
    cut = runs.shape[-1] // 4
    return np.mean(runs[..., cut : runs.shape[-1] - cut], axis=-1)


STATISTICS: Mapping[str, Callable[[Sequence[Array]], Array]] = {
    "mean": mean,
    "median": median,
    "interquartile mean": interquartile_mean,
}


def _per_game(samples: Sequence[Array]) -> Array:
    return np.stack([np.mean(game, axis=-1) for game in samples], axis=-1)


def estimate(normalised: Scores, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Every statistic with its percentile interval.

    The bootstrap is stratified: each resample draws, with replacement, as many seeds of every game as there are. Games
    need not have equally many.

    Raises:
      ValueError: if there is no game, or a game has no score.
    """
    samples = [np.asarray(values, np.float64) for values in normalised.values()]
    if not samples or min(len(values) for values in samples) == 0:
        raise ValueError("estimate: every game needs a score")
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(STATISTICS)
    if min(len(values) for values in samples) > 1:
        random = np.random.default_rng(seed)
        drawn = [values[random.integers(len(values), size=(resamples, len(values)))] for values in samples]
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        for name, statistic in STATISTICS.items():
            low, high = np.quantile(statistic(drawn), tails)
            intervals[name] = float(low), float(high)
    return {name: Estimate(float(statistic(samples)), intervals[name]) for name, statistic in STATISTICS.items()}


def normalise(raw: Scores) -> dict[str, list[float]]:
    """Human-normalised scores of the games that have references and at least one score."""
    ratios = {game: [scores.human_normalised(game, float(value)) for value in values] for game, values in raw.items()}
    return {
        game: known for game, values in ratios.items() if (known := [value for value in values if value is not None])
    }


def published(games: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Column -> its scores of these games, their human-normalised mean and median; columns without any are left out.

    An interquartile mean needs the single runs, which tables of means do not have.
    """
    known = scores.table()
    columns = dict.fromkeys(name for row in known.values() for name in row if name not in REFERENCES)
    result: dict[str, dict[str, Any]] = {}
    for name in columns:
        values = {game: known[game][name] for game in games if name in known.get(game, {})}
        if values:
            single = [np.asarray(value) for value in normalise({game: [one] for game, one in values.items()}).values()]
            result[name] = {"scores": values, "mean": float(mean(single)), "median": float(median(single))}
    return result


def summary(raw: Scores) -> dict[str, Any]:
    """All of it, as it is written to suite.json."""
    normalised = normalise(raw)
    estimates = estimate(normalised) if normalised else {}
    return {
        "games": {
            game: {
                "scores": [float(value) for value in values],
                "mean": float(np.mean(values)) if values else None,
                "standard_error": standard_error(values),
                "human_normalised": float(np.mean(normalised[game])) if game in normalised else None,
            }
            for game, values in raw.items()
        },
        "human_normalised": {
            name: {"value": one.value, "interval": None if one.interval is None else list(one.interval)}
            for name, one in estimates.items()
        },
        "interval_level": LEVEL,
        "published": published(list(raw)),
    }


def markdown(result: Mapping[str, Any], all_columns: bool) -> str:
    """The table of a `summary`, beside every published column or beside a few."""
    beside = {
        name: name if all_columns else BESIDE[name] for name in result["published"] if all_columns or name in BESIDE
    }
    head = ["game", *REFERENCES, *beside.values(), "this suite", "seeds", "human-normalised"]
    body = [_row(game, one, result, list(beside)) for game, one in result["games"].items()]
    body += _aggregates(result, list(beside))
    if all_columns:
        return markdown_table(head, body)
    lines = [head, [], *body]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )


def _row(game: str, one: Mapping[str, Any], result: Mapping[str, Any], beside: Sequence[str]) -> list[str]:
    references = [scores.table().get(game, {}).get(name) for name in REFERENCES]
    others = [result["published"][name]["scores"].get(game) for name in beside]
    error = "" if one["standard_error"] is None else f" ± {score(one['standard_error'])}"
    cells = [score(value) for value in (*references, *others)]
    return [
        game,
        *cells,
        f"{score(one['mean'])}{error}",
        str(len(one["scores"])),
        _ratio(one["human_normalised"]),
    ]


def _aggregates(result: Mapping[str, Any], beside: Sequence[str]) -> list[list[str]]:
    """The last rows: of how many games, and the human-normalised statistics of these."""
    counts = [str(len(result["published"][name]["scores"])) for name in beside]
    scored = sum(one["human_normalised"] is not None for one in result["games"].values())
    rows = [["games", "", "", *counts, str(scored), "", ""]]
    for name, one in result["human_normalised"].items():
        others = [_ratio(result["published"][column].get(name)) for column in beside]
        interval = "" if one["interval"] is None else f" [{', '.join(_ratio(end) for end in one['interval'])}]"
        rows.append(
            [f"human-normalised {name}", "0.000", "1.000", *others, "", "", f"{_ratio(one['value'])}{interval}"]
        )
    return rows


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
