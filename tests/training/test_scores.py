"""Reference scores and the human-normalised score."""

from __future__ import annotations

import json

import pytest

from drama_jax.envs.games import ATARI_100K
from drama_jax.training import scores


def test_the_table_has_the_26_games_with_their_references():
    table = scores.table()
    assert sorted(table) == sorted(ATARI_100K)
    assert (table["Pong"]["random"], table["Pong"]["human"]) == (-20.7, 14.6)
    assert (table["Breakout"]["random"], table["Breakout"]["human"]) == (1.7, 30.5)


def test_no_unverified_score_of_drama_is_published():
    without = {game for game, columns in scores.table().items() if "Drama_XS" not in columns}
    assert without == {"Breakout", "Freeway", "Pong", "PrivateEye"}
    assert not any("recall" in column for columns in scores.table().values() for column in columns)


@pytest.mark.parametrize(
    ("game", "score", "expected"), [("Breakout", 1.7, 0.0), ("Breakout", 30.5, 1.0), ("Pong", -3.05, 0.5)]
)
def test_human_normalised(game, score, expected):
    assert scores.human_normalised(game, score) == pytest.approx(expected, abs=1e-12)


def test_a_game_without_references_has_no_normalised_score():
    assert scores.human_normalised("Tetris", 10.0) is None
    assert scores.summary("Tetris", [10.0])["human_normalised"] is None


def test_summary():
    assert scores.summary("Breakout", [16.1, 16.1]) == {
        "evaluation_returns": [16.1, 16.1],
        "mean": 16.1,
        "human_normalised": pytest.approx(0.5),
    }
    assert scores.summary("Breakout", []) == {"evaluation_returns": [], "mean": None, "human_normalised": None}


def test_the_printed_table():
    text = scores.format_table("Boxing", [12.1, 0.1])
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert rows["random"] == ["0.10", "0.000"] and rows["human"] == ["12.10", "1.000"]
    assert rows["Drama XS, published"] == ["78.00", "6.492"]
    assert rows["this run"] == ["6.10", "0.500"]
    assert "2 episodes, lowest 0, highest 12" in text
    assert "Drama" not in scores.format_table("Breakout", [1.0])
    assert "this run" not in scores.format_table("Breakout", [])


def test_a_file_is_written_whole(tmp_path):
    scores.write(tmp_path / "scores.json", {"mean": 1.5})
    scores.write(tmp_path / "scores.json", {"mean": 2.5})
    assert json.loads((tmp_path / "scores.json").read_text()) == {"mean": 2.5}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
