"""The pictures of a run, from a checkpoint that has learned nothing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from drama_jax.config import RunConfig
from drama_jax.replay import Batch
from drama_jax.training import config_file
from experiments import pictures


def test_the_configuration_of_a_run_comes_back(saved_run):
    directory, config = saved_run
    game, loaded = config_file.load_config(directory)
    assert game == "Breakout" and loaded == config and isinstance(loaded, RunConfig)
    assert hash(loaded) == hash(config)


def test_both_pictures_show_one_column_per_frame(saved_run, tmp_path, capsys):
    out = tmp_path / "new" / "docs"
    arguments = ["--logdir", str(saved_run[0]), "--out", str(out), "--steps", "30", "--frames", "3", "--every", "2"]
    assert pictures.main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(out / "reconstructions.png"), str(out / "imagination.png")]
    shapes = {path.name: np.asarray(Image.open(path)).shape for path in out.iterdir()}
    assert set(shapes) == {"reconstructions.png", "imagination.png"}
    assert 2 < shapes["imagination.png"][1] / shapes["reconstructions.png"][1] < 3  # 9 columns against 3
    # The real frames are in colour: the picture is not blank.
    assert len(np.unique(np.asarray(Image.open(out / "reconstructions.png")).reshape(-1, 4), axis=0)) > 20


def test_the_window_lies_inside_one_episode_if_one_is_long_enough():
    firsts = np.zeros((1, 12), bool)
    firsts[0, [0, 7]] = True
    steps = np.arange(12)[None]
    played = Batch(frames=steps, actions=steps, rewards=steps, terminals=steps, firsts=firsts)
    np.testing.assert_array_equal(pictures._window(played, 5).actions, [[7, 8, 9, 10, 11]])
    np.testing.assert_array_equal(pictures._window(played, 7).actions, [[0, 1, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(pictures._window(played, 8).actions, [[4, 5, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_directory_without_a_run_is_one_line(tmp_path, capsys, name):
    assert pictures.main(["--logdir", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "is no run directory" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_of_another_version_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"game": "Breakout", "config": {"stepz": 1}}')
    assert pictures.main(["--logdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "was not written by this version" in error and error.count("\n") == 1


def test_too_few_steps_are_refused(saved_run, tmp_path, capsys):
    assert pictures.main(["--logdir", str(saved_run[0]), "--out", str(tmp_path / "docs"), "--steps", "3"]) == 2
    assert "--steps 3" in capsys.readouterr().err
    assert pictures.main(["--logdir", str(saved_run[0]), "--out", str(tmp_path / "docs"), "--every", "0"]) == 2
    assert capsys.readouterr().err == "error: --every 0: must lie in [1, 16]\n"
    assert list(tmp_path.iterdir()) == []
