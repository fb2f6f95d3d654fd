"""The directory of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re

import pytest

from drama_jax.config import ConfigError, RunConfig, preset
from drama_jax.training import config_file, resume, run_directory

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"


def test_it_holds_the_resolved_configuration_and_the_versions(tmp_path):
    config = dataclasses.replace(preset("tiny"), seed=7)
    directory = run_directory.create(tmp_path / "runs", "Breakout", "tiny", config)
    assert directory.parent == tmp_path / "runs" / "Breakout" / "tiny"
    assert re.fullmatch(r"seed7-\d{8}-\d{6}", directory.name)
    written = json.loads((directory / "config.json").read_text())
    assert written["game"] == "Breakout" and written["preset"] == "tiny"
    assert written["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert {"python", "jax", "numpy", "flax"} <= set(written["versions"])
    assert written["device"]


def test_what_an_older_version_wrote_is_read_as_what_it_did(tmp_path):
    config = _with_free_bits_of_the_mean(preset("tiny"))
    directory = run_directory.create(tmp_path, "Pong", "tiny", config)
    written = json.loads((directory / "config.json").read_text())
    for path, value in config_file.LATER.items():
        *groups, name = path.split("/")
        part = written["config"]
        for group in groups:
            part = part[group]
        assert part.pop(name) == value == functools.reduce(getattr, path.split("/"), config)
    (directory / "config.json").write_text(json.dumps(written))
    assert config_file.load_config(directory) == ("Pong", config)
    assert resume.check(directory, "Pong", "tiny", config) == (written["id"], {})
    same = {"agent/behaviour/name": "actor_critic", "agent/world_model/backbone/name": "mamba2"}
    assert resume.runs(tmp_path, "Pong", "tiny", config, same) == [directory]
    assert resume.runs(tmp_path, "Pong", "tiny", config, same | {"agent/behaviour/name": "ppo"}) == []
    other = _with_free_bits_of_the_mean(preset("tiny", behaviour="ppo"))
    with pytest.raises(ConfigError, match="behaviour.name: the run in .* has actor_critic, given ppo; only steps"):
        resume.check(directory, "Pong", "tiny", other)
    with pytest.raises(ConfigError, match="free-bits-each: the run in .* has False, given True; only steps"):
        resume.check(directory, "Pong", "tiny", preset("tiny"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_runs_of_every_version_that_has_published_results_can_be_continued(tmp_path, path):
    """A new field of the configuration needs an entry in `config_file.LATER`."""
    result = json.loads(path.read_text())
    run = {"id": "a run"} | {name: result[name] for name in ("game", "preset", "config")}
    (tmp_path / "config.json").write_text(json.dumps(run))
    game, config = config_file.load_config(tmp_path)
    assert resume.check(tmp_path, game, result["preset"], config) == ("a run", {})


def _with_free_bits_of_the_mean(config):
    model = dataclasses.replace(config.agent.world_model, free_bits_each=False)
    return dataclasses.replace(config, agent=dataclasses.replace(config.agent, world_model=model))


def test_two_runs_in_one_second_do_not_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory.time, "strftime", lambda _: "20260101-000000")
    names = [run_directory.create(tmp_path, "Pong", "xs", RunConfig()).name for _ in range(3)]
    assert names == ["seed0-20260101-000000", "seed0-20260101-000000-2", "seed0-20260101-000000-3"]


def test_a_file_in_the_way_is_an_error_and_nothing_is_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--logdir .*file is a file; name a directory"):
        run_directory.check(tmp_path / "file" / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_directory_without_permission_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="--logdir .* cannot be written to"):
        run_directory.check(tmp_path / "runs")


def test_a_directory_that_does_not_exist_yet_is_fine(tmp_path, monkeypatch):
    run_directory.check(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    run_directory.check(run_directory.pathlib.Path("runs"))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_file_system_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.scores, "write", full)
    with pytest.raises(ConfigError, match="--logdir .*No space left on device"):
        run_directory.create(tmp_path, "Pong", "xs", RunConfig())
