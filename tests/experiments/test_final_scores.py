"""What a command does at the end of a run where the world around it is broken."""

from __future__ import annotations

import io
import json
import sys
import types

import pytest

from drama_jax.config import preset
from drama_jax.training.member import Training
from experiments import final_scores, runner
from experiments.exits import Failed
from experiments.runs import Run


def training(fault=None):
    return Training(state=None, returns=[(4, 1.0)], wall_clock_s=3.0, this_part_s=1.0, ms_per_step=None, fault=fault)


def test_scores_are_on_the_disk_before_they_are_printed(tmp_path, monkeypatch):
    there = []

    class Closed(io.StringIO):
        """A pipe whose reader has gone."""

        def write(self, text):
            there.append((tmp_path / "scores.json").exists())
            raise BrokenPipeError

    run = Run("Breakout", preset("tiny"), "tiny", tmp_path, "a run", None, [])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        final_scores.report(run, training(), [1.0, 3.0], 5.0)
    assert there == [True]
    written = json.loads((tmp_path / "scores.json").read_text())
    assert (written["mean"], written["wall_clock_s"], written["training_s"]) == (2.0, 5.0, 3.0)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (None, "smoke. What was learnt is saved in {run}; the same command continues there"),
        ("no room", "smoke. no room; the same command continues there"),
    ],
)
def test_a_run_that_failed_says_what_is_saved(tmp_path, monkeypatch, problem, said):
    member = types.SimpleNamespace(checkpoints=types.SimpleNamespace(problem=problem))
    monkeypatch.setattr(runner, "initial", lambda *_: None)
    monkeypatch.setattr(runner, "_member", lambda *_: member)
    monkeypatch.setattr(runner.loop, "train_together", lambda *_, **__: [training("smoke")])
    run = Run("Breakout", preset("tiny"), "tiny", tmp_path, "a run", None, [])
    options = types.SimpleNamespace(devices=None, check=False)
    with pytest.raises(Failed) as error:
        runner.train([run], [types.SimpleNamespace(num_actions=4)], options, lambda: False)
    assert str(error.value) == said.format(run=tmp_path)
