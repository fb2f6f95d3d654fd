"""Evaluation of a checkpoint, and of a file of weights."""

from __future__ import annotations

import json

import pytest

from drama_jax.training import checkpoint, weights
from experiments import evaluate

FEW = ["--episodes", "3", "--num-envs", "2"]


def play(*arguments: str) -> int:
    return evaluate.main([*arguments, *FEW])


@pytest.fixture(scope="module")
def few_steps(saved_run, tmp_path_factory):
    """The run with evaluation episodes of twelve steps."""
    directory = tmp_path_factory.mktemp("few")
    content = json.loads((saved_run[0] / "config.json").read_text())
    content["config"]["evaluation"]["max_episode_steps"] = 12
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "checkpoints").symlink_to(saved_run[0] / "checkpoints")
    return directory


def test_a_checkpoint_and_its_weights_in_a_file_score_alike(few_steps, tmp_path, capsys):
    file = tmp_path / "breakout.npz"
    weights.write(file, checkpoint.load_weights(few_steps))
    assert play("--logdir", str(few_steps)) == 0
    assert play("--logdir", str(few_steps), "--weights", str(file)) == 0
    printed = capsys.readouterr().out
    assert printed.count("this run") == 2
    results = [json.loads((few_steps / f"evaluation-{name}.json").read_text()) for name in ("7", "breakout")]
    assert [result.pop("weights") for result in results] == ["checkpoint 7", "breakout.npz"]
    assert results[0] == results[1]
    assert len(results[0]["evaluation_returns"]) == 3 and results[0]["num_envs"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "8"], "no checkpoint of step 8"),
        (["--weights", "w.npz"], "w.npz: cannot be read"),
        (["--weights", "w.pt"], "--weights w.pt: a file of weights is named *.npz"),
        (["--weights", "w.npz", "--step", "7"], "name one of the two"),
        (["--num-envs", "0"], "--num-envs must lie in [1, 4096], got 0"),
        (["--episodes", "-3"], "--episodes must lie in [1, 4096], got -3"),
        (["--env-backend", "gym"], "--env-backend must be one of"),
        (["--episode", "3"], "--episode"),
    ],
)
def test_mistakes_are_one_line(saved_run, capsys, arguments, message):
    before = sorted(saved_run[0].iterdir())
    assert evaluate.main(["--logdir", str(saved_run[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(saved_run[0].iterdir()) == before


def test_no_run_is_one_line(tmp_path, capsys):
    assert play("--logdir", str(tmp_path)) == 2
    assert "is no run directory" in capsys.readouterr().err
