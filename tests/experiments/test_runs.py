"""Which directories the agents of a command go on in, and from which step, after an end at an awkward moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types

import numpy as np
import pytest

from drama_jax.config import ConfigError, preset
from drama_jax.training import checkpoint, run_directory
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from experiments import runs
from experiments.sweep import Planned

PLANNED = [Planned(dataclasses.replace(preset("tiny"), seed=seed)) for seed in range(3)]


def prepare(logdir, planned=PLANNED[:2]):
    """The command's runs, not locked any more."""
    options = types.SimpleNamespace(logdir=logdir, preset="tiny", resume=True)
    with contextlib.ExitStack() as stack:
        return runs.prepare(options, "Pong", planned, stack)


def save(run, *steps):
    """Completes checkpoints of a run."""
    checkpoints = Checkpoints(run.directory, run.identity, 1)
    for step in steps:
        checkpoints.save(Snapshot(step, 0, {"agent/x": np.zeros(1)}, {}, {}))
    checkpoints.close()


def names(run):
    """What is among its checkpoints."""
    return sorted(path.name for path in (run.directory / checkpoint.FOLDER).iterdir())


def test_a_command_that_could_not_create_all_directories_goes_on_when_it_can(tmp_path, monkeypatch):
    create, made = run_directory.create, []

    def full(*arguments):
        if made:
            raise ConfigError("the disk is full")
        made.append(create(*arguments))
        return made[0]

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="full"):
        patch.setattr(run_directory, "create", full)
        prepare(tmp_path)
    found = prepare(tmp_path)
    assert [run.config.seed for run in found] == [0, 1] and found[0].directory == made[0]
    assert [run.directory for run in prepare(tmp_path)] == [run.directory for run in found]
    # A third one may join as long as all are at step 0.
    more = prepare(tmp_path, PLANNED)
    assert [run.directory for run in more[:2]] == [run.directory for run in found] and more[2].step == 0
    save(found[0], 10)
    with pytest.raises(ConfigError, match="seed 0 has begun and seed 5 has not"):
        prepare(tmp_path, [PLANNED[0], Planned(dataclasses.replace(preset("tiny"), seed=5))])


def test_killed_while_the_first_checkpoints_are_saved_all_begin_anew(tmp_path, capsys):
    one, other = prepare(tmp_path)
    save(one, 10)
    (other.directory / checkpoint.FOLDER / "10.partial").mkdir(parents=True)
    assert [(run.step, run.snapshot, run.segments) for run in prepare(tmp_path)] == [(0, None, [])] * 2
    assert names(one) == ["10.ahead"]
    assert (
        f"checkpoint 10 is of a later step than another agent's; it is now {one.directory}" in capsys.readouterr().err
    )
    # The same once more.
    save(one, 10)
    prepare(tmp_path)
    assert names(one) == ["10.ahead", "10.ahead2"]
    assert len(json.loads((one.directory / "config.json").read_text())["continued"]) == 2


def test_a_run_that_has_lost_its_checkpoints_does_not_send_the_others_back_to_step_0(tmp_path):
    one, _ = prepare(tmp_path)
    save(one, 10, 20)
    with pytest.raises(ConfigError, match=r"cannot go on at step 0, .* it has checkpoints of 10, 20; run them in two"):
        prepare(tmp_path)
    assert names(one) == ["10", "20"]
