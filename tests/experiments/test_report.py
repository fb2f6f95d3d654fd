"""Results, tables and curves of full runs."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from drama_jax.config import preset
from experiments import figures, report, run_results

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A run of 20,000 steps that was asked for 30,000."""
    agent = dataclasses.asdict(preset("xs").agent)
    agent["world_model"].pop("free_bits_each")  # as the files of an older version
    described = {
        "game": "Pong",
        "preset": "xs",
        "config": {"agent": agent | {"warmup_steps": 2_048}, "seed": 3, "steps": 30_000},
        "versions": {"jax": "0.0", "platform": "of the machine"},
        "device": "a card",
        "commit": "abc",
    }
    lines = [{"step": 4_000, "charts/episodic_return": -21.0}]
    lines += [{"step": 10_000, "charts/SPS": 50.0, "world_model/total_loss": 2.0, "actor_critic/entropy": 1.23456}]
    lines += [{"step": 12_000, "charts/episodic_return": -3.0}, {"step": 18_000, "charts/episodic_return": 5.0}]
    lines += [{"step": 20_000, "charts/SPS": 100.0, "world_model/total_loss": None, "actor_critic/entropy": 1.0}]
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_that_was_cut_short(run):
    result = run_results.collect(run)
    assert (result["steps"], result["complete"]) == (20_000, False)
    assert result["last_training_mean"] == 1.0  # of the two that ended after step 10,000
    assert result["wall_clock_s"] == 10_000 / 50 + 10_000 / 100
    assert result["ms_per_step"] == 15.0
    assert result["evaluation_returns"] == [] and result["training_returns"][0] == (4_000, -21.0)
    assert result["versions"] == {"jax": "0.0"}
    assert result["curves"] == {
        "step": [10_000, 20_000], "charts/SPS": [50, 100], "world_model/total_loss": [2, None],
        "actor_critic/entropy": [1.235, 1],
    }  # fmt: skip
    where = "`free_bits_each` False, `warmup_steps` 2048"
    assert f"| Pong (xs, seed 3), {where}, cut at 20,000 steps |" in report.all_columns([result])
    assert f"| Pong xs seed 3, {where} |" in report.runs([result])


def test_a_run_with_an_evaluation_of_its_own_or_another(run):
    scored = {"evaluation_returns": [1.0, 3.0], "device": "a card", "training_s": 90.0}
    (run / "other.json").write_text(json.dumps(scored | {"evaluation_returns": [7.0], "device": "cpu"}))
    assert run_results.collect(run, run / "other.json")["evaluation_returns"] == [7.0]
    (run / "scores.json").write_text(json.dumps(scored))
    result = run_results.collect(run)
    assert (result["evaluation_returns"], result["wall_clock_s"]) == ([1.0, 3.0], 90.0)
    table = report.all_columns([result])
    assert "| 2.0 ± 1.0 |" in table  # standard error: 1.41 / sqrt(2)


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_files_that_are_missing_are_one_line(run, capsys, missing):
    (run / missing).unlink()
    assert report.main(["--add", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and missing in error and error.count("\n") == 1


def test_seconds_of_training_are_taken_where_the_lines_have_them(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timed = [json.dumps(json.loads(line) | {"seconds": 7.0 * count}) for count, line in enumerate(lines, start=1)]
    # Continued by this version, and ended in the middle of a line.
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], *timed[3:], '{"step": 20005, "cha']))
    result = run_results.collect(run)
    assert (result["steps"], result["wall_clock_s"], result["ms_per_step"]) == (20_000, 35.0, 15.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1]", "config.json is no JSON object"),
        ("config.json", b'{"game": "Pong"}', "config.json has no preset, config, device, commit, versions"),
        ("config.json", b'{"game": "', "config.json is not JSON"),
        ("scores.json", b'{"steps": 20000}', "scores.json has no training_s, evaluation_returns, device; a run of"),
        ("metrics.jsonl", b'{"step": 1}\nstep 2\n{"step": 3}\n', "metrics.jsonl: line 2 is damaged"),
        ("metrics.jsonl", b'{"step": 1}\n[2]\n', "metrics.jsonl: line 2 is damaged"),
        ("metrics.jsonl", b"\xa1\xff\n", "metrics.jsonl: line 1 is damaged"),
        ("metrics.jsonl", b'{"step": 1', "metrics.jsonl: no step was logged"),
    ],
)
def test_files_of_something_else_are_one_line(run, capsys, name, content, message):
    (run / name).write_bytes(content)
    assert report.main(["--add", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_evaluation_needs_its_run(run, capsys):
    assert report.main(["--evaluation", str(run / "scores.json")]) == 2
    assert "--add" in capsys.readouterr().err


def test_the_tables_are_those_of_the_results():
    """`python -m experiments.report` leaves the committed files as they are."""
    found = run_results.load()
    assert found
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.in_readme(readme, found) == readme
    assert (run_results.DIRECTORY / "README.md").read_text(encoding="utf-8") == report.all_columns(found)
    for result in found:
        assert result["last_training_mean"] == run_results.last_mean(result["training_returns"], result["steps"])


def test_curves_have_a_panel_per_game(run, tmp_path):
    one = run_results.collect(run)
    figures.curves([one], tmp_path / "one.png")
    figures.curves([one, one | {"seed": 4}, one | {"game": "Boxing"}], tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as single, Image.open(tmp_path / "two.png") as double:
        assert double.size == (2 * single.size[0], single.size[1])
    figures.curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_score_far_above_the_runs_is_named_but_not_drawn(run):
    axis = figures.import_figure()().subplots()
    one = run_results.collect(run) | {"game": "Alien", "training_returns": [(10, 300.0), (20, 900.0)]}
    figures._curve(axis, one)
    figures._references(axis, "Alien")
    labels = [text.get_text() for text in axis.legend().get_texts()]
    assert "human 7,128, above" in labels and "Drama XS" in labels
    assert axis.get_ylim()[1] < 2_000


def test_the_running_mean_starts_with_what_there_is():
    values = np.arange(6.0)
    np.testing.assert_allclose(figures.running_mean(values, 3), [0, 0.5, 1, 2, 3, 4])
