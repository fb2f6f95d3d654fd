"""Statistics over games and seeds: literal values, the definition of a trimmed mean, and intervals that hold."""

from __future__ import annotations

import numpy as np
import pytest

from drama_jax.training import scores
from experiments import aggregate, tables

# Two games of four seeds. Per game 2.5 and 25; of the eight runs 1 2 3 4 10 20 30 40 the middle four are 3 4 10 20.
TWO = {"A": [4.0, 1.0, 3.0, 2.0], "B": [10.0, 40.0, 20.0, 30.0]}


def test_literal_values():
    found = aggregate.estimate(TWO)
    assert {name: one.value for name, one in found.items()} == {
        "mean": 13.75,
        "median": 13.75,
        "interquartile mean": 9.25,
    }


def test_the_median_is_over_games():
    three = aggregate.estimate({"A": [0.0, 2.0], "B": [10.0, 10.0], "C": [100.0, 304.0]})
    assert three["median"].value == 10.0 and three["mean"].value == 71.0


@pytest.mark.parametrize("seeds", [1, 3, 5])
@pytest.mark.parametrize("games", [1, 2, 7, 26])
def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end(games, seeds):
    """As a trimmed mean is defined: of n values, the int(0.25 n) lowest and highest are cut off."""
    values = np.random.default_rng(games).normal(size=(games, seeds))
    wanted = sorted(values.ravel())
    for _ in range(int(0.25 * values.size)):
        wanted = wanted[1:-1]
    found = aggregate.interquartile_mean(list(values))
    np.testing.assert_allclose(found, sum(wanted) / len(wanted), rtol=1e-13)


def test_one_run_far_off_does_not_move_the_interquartile_mean():
    far = TWO | {"B": [10.0, 4e9, 20.0, 30.0]}
    assert aggregate.estimate(far)["interquartile mean"].value == 9.25


def test_games_may_have_different_numbers_of_seeds():
    found = aggregate.estimate({"A": [1.0, 3.0], "B": [5.0, 6.0, 10.0]})
    assert found["mean"].value == 4.5
    assert found["interquartile mean"].value == pytest.approx((3 + 5 + 6) / 3)
    assert found["mean"].interval is not None


def test_the_resamples_are_stratified():
    """Seeds that agree give a point, however far apart the games are."""
    found = aggregate.estimate({"A": [1.0, 1.0, 1.0], "B": [100.0, 100.0, 100.0]})
    assert {name: one.interval for name, one in found.items()} == {
        "mean": (50.5, 50.5),
        "median": (50.5, 50.5),
        "interquartile mean": (50.5, 50.5),
    }


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    """With many seeds: mean ± 1.96 of the bootstrap's own standard error."""
    values = np.random.default_rng(0).normal(size=(4, 400))
    error = np.sqrt(np.sum(np.var(values, axis=1)) / 400) / 4
    low, high = aggregate.estimate({str(i): row for i, row in enumerate(values)})["mean"].interval
    np.testing.assert_allclose([low, high], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.05 * error)


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    """Of 300 suites of 5 games x 30 seeds with known mean and median: 95 % of the intervals, give or take 4 %."""
    random, centres = np.random.default_rng(1), np.array([0.1, 0.5, 1.0, 2.0, 6.0])
    held = {"mean": 0, "median": 0}
    for _ in range(300):
        draws = random.normal(centres[:, None], 0.5, size=(5, 30))
        found = aggregate.estimate({str(i): row for i, row in enumerate(draws)}, resamples=500)
        for name, truth in (("mean", centres.mean()), ("median", 1.0)):
            low, high = found[name].interval
            held[name] += low <= truth <= high
    assert all(0.91 <= count / 300 <= 0.99 for count in held.values()), held


def test_one_seed_has_no_interval():
    found = aggregate.estimate({"A": [1.0], "B": [2.0, 3.0]})
    assert found["mean"].value == 1.75 and found["mean"].interval is None


@pytest.mark.parametrize("nothing", [{}, {"A": [1.0], "B": []}])
def test_every_game_needs_a_score(nothing):
    with pytest.raises(ValueError, match="every game needs a score"):
        aggregate.estimate(nothing)


def test_normalised_scores_and_standard_errors():
    assert aggregate.normalise({"Pong": [-20.7, 14.6], "Adventure": [1.0], "Alien": []}) == {"Pong": [0.0, 1.0]}
    assert tables.standard_error([1.0, 3.0]) == 1.0
    assert tables.standard_error([1.0]) is None


def test_published_columns_are_of_the_games_they_have():
    columns = aggregate.published(["Boxing", "Breakout"])
    assert columns["Drama_XS"]["scores"] == {"Boxing": 78.0}
    assert columns["Drama_XS"]["mean"] == pytest.approx(77.9 / 12.0)
    storm = [scores.human_normalised(game, columns["STORM"]["scores"][game]) for game in ("Boxing", "Breakout")]
    assert columns["STORM"]["mean"] == columns["STORM"]["median"] == pytest.approx(sum(storm) / 2)


def test_the_table():
    result = aggregate.summary({"Boxing": [6.1, 12.1], "Breakout": [1.7, 30.5], "Adventure": [1.0], "Alien": []})
    assert result["games"]["Boxing"] == {
        "scores": [6.1, 12.1],
        "mean": pytest.approx(9.1),
        "standard_error": pytest.approx(3.0),
        "human_normalised": pytest.approx(0.75),
    }
    assert result["human_normalised"]["mean"]["value"] == pytest.approx((0.75 + 0.5) / 2)
    lines = aggregate.markdown(result, all_columns=True).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| Boxing | 0.1 | 12.1 |" in lines[2] and lines[2].endswith("| 9.1 ± 3.0 | 2 | 0.750 |")
    assert lines[4].startswith("| Adventure |  |  |") and lines[4].endswith("| 1.0 | 1 |  |")
    assert lines[5].endswith("|  | 0 |  |")
    assert lines[6].startswith("| games |") and lines[6].endswith("| 2 |  |  |")
    assert [line.split(" |")[0] for line in lines[7:]] == [
        f"| human-normalised {name}" for name in aggregate.STATISTICS
    ]
    low, high = result["human_normalised"]["mean"]["interval"]
    assert lines[7].endswith(f"0.625 [{low:.3f}, {high:.3f}] |")
    plain = aggregate.markdown(result, all_columns=False).splitlines()
    assert len({len(line) for line in plain}) == 1 and "Drama" in plain[0] and "SimPLe" not in plain[0]
