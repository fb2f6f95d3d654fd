"""Pictures of results. Needs matplotlib (in the extra `drama_jax[test]`)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drama_jax.config import ConfigError
from drama_jax.training import scores

_COLUMNS = 4
_SMOOTH = 10
"""Episodes in the running mean of a curve."""
_ROOM = 2.5
"""Times the height of a panel's episodes within which other scores are drawn."""


def import_figure() -> Any:
    """matplotlib's Figure: no pyplot, so no display is needed and no global state is left.

    Raises:
      ConfigError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("matplotlib is not installed: run python -m pip install matplotlib") from error
    return Figure


def curves(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Return against agent steps, a panel per game: episodes as dots, their running mean, and the reference scores."""
    if not results:
        return
    games = list(dict.fromkeys(result["game"] for result in results))
    columns = min(_COLUMNS, len(games))
    rows = -(-len(games) // columns)
    picture = import_figure()(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(games) :]:
        axis.set_axis_off()
    for axis, game in zip(axes, games):
        for result in (one for one in results if one["game"] == game):
            _curve(axis, result)
        _references(axis, game)
        axis.set_title(game)
        axis.set_xlabel("agent steps")
        axis.locator_params(axis="x", nbins=5)
        axis.legend(fontsize=6, loc="best")
    picture.savefig(path, dpi=110)


def _references(axis: Any, game: str) -> None:
    """Lines at the scores of others; one so high that the runs would be flat below it is only named."""
    low, high = axis.get_ylim()
    highest = low + _ROOM * (high - low)
    for name, colour in (("random", "0.6"), ("Drama_XS", "tab:red"), ("human", "tab:green")):
        score = scores.table().get(game, {}).get(name)
        if score is None:
            continue
        style = {"color": colour, "linewidth": 1, "linestyle": "--"}
        label = name.replace("_", " ")
        if score > highest:
            axis.plot([], [], **style, label=f"{label} {score:,.0f}, above")
        else:
            axis.axhline(score, **style, label=label)


def _curve(axis: Any, result: Mapping[str, Any]) -> None:
    steps, returns = (np.asarray(column) for column in zip(*result["training_returns"]))
    (line,) = axis.plot(steps, running_mean(returns), label=f"{result['preset']} seed {result['seed']}")
    axis.plot(steps, returns, ".", markersize=2, alpha=0.4, color=line.get_color())
    if result["evaluation_returns"]:
        mean = float(np.mean(result["evaluation_returns"]))
        axis.plot([result["steps"]], [mean], "*", markersize=9, color=line.get_color(), label="evaluation")


def running_mean(values: np.ndarray, window: int = _SMOOTH) -> np.ndarray:
    """Mean of each value [N] and up to `window` - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means
