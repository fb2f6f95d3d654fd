"""Several agents in one process: each as if it were alone, also when the process is killed, and on several devices."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from micro import ARGUMENTS, ENVIRONMENT, Killed, compiled_fast, final, haunted, main, metrics, steps_saved

from drama_jax.training import arrays, checkpoint
from experiments import atari100k

UPDATES = 200
LONG = f"--steps {14 + UPDATES} --logging.checkpoint-every 500".split()


@pytest.fixture(scope="module", autouse=True)
def fast():
    with compiled_fast():
        yield


def runs(logdir: pathlib.Path) -> dict[int, pathlib.Path]:
    """Seed -> its run directory."""
    found = {int(path.name[4:].partition("-")[0]): path for path in logdir.glob("*/*/seed*")}
    assert len(found) == len(list(logdir.glob("*/*/seed*")))
    return found


def close(one: dict, other: dict) -> float:
    """Largest distance of two agents' weights, relative to the largest weight of the array."""
    one, other = (arrays.flatten(tree) for tree in (one, other))
    assert one.keys() == other.keys()
    apart = [np.max(np.abs(one[name] - other[name])) / max(np.max(np.abs(one[name])), 1e-6) for name in one]
    return float(max(apart))


def assert_as_alone(run: pathlib.Path, alone: pathlib.Path) -> None:
    """The same steps, draws and episodes, and the same numbers up to float32 rounding over all updates."""
    lines, wanted = metrics(run), metrics(alone)
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, other in zip(lines, wanted):
        for tag, value in line.items():
            if tag.startswith(("dfs/", "charts/", "replay/", "guard/", "step")):
                assert value == other[tag], (tag, line["step"])
            else:
                np.testing.assert_allclose(value, other[tag], rtol=1e-3, atol=1e-4, err_msg=tag)
    saved = [checkpoint.load(path, json.loads((path / "config.json").read_text())["id"])[0] for path in (run, alone)]
    for name in saved[0].device:
        if "/counters/" in name or name.startswith("keys/"):
            np.testing.assert_array_equal(saved[0].device[name], saved[1].device[name], err_msg=name)
    np.testing.assert_array_equal(saved[0].host["environment"], saved[1].host["environment"])
    assert close(*(checkpoint.load_weights(path) for path in (run, alone))) < 1e-3


def test_every_seed_trains_as_if_it_were_alone(tmp_path):
    """Over 200 updates: draws, actions and episodes are the same, losses and weights within 1e-3."""
    assert main(tmp_path / "together", *LONG, "--seed", "5", "--seeds", "2") == 0
    together = runs(tmp_path / "together")
    assert sorted(together) == [5, 6]
    assert main(tmp_path / "alone", *LONG, "--seed", "6") == 0
    assert_as_alone(together[6], runs(tmp_path / "alone")[6])
    assert [json.loads((together[seed] / "scores.json").read_text())["seed"] for seed in (5, 6)] == [5, 6]


def test_swept_values_train_as_if_they_were_alone(tmp_path):
    sweep = "--sweep.learning-rate 4e-4 1e-3 --sweep.entropy-scale 3e-3 0.1".split()
    assert main(tmp_path / "together", *sweep) == 0
    together = sorted((tmp_path / "together").glob("*/*/seed*"))
    values = [json.loads((run / "config.json").read_text())["config"]["agent"] for run in together]
    assert [value["world_model"]["optimizer"]["learning_rate"] for value in values] == [4e-4, 1e-3]
    flags = "--agent.world-model.optimizer.learning-rate 1e-3 --agent.behaviour.entropy-scale 0.1".split()
    assert main(tmp_path / "alone", *flags) == 0
    (alone,) = (tmp_path / "alone").glob("*/*/seed*")
    assert_as_alone(together[1], alone)
    assert close(checkpoint.load_weights(together[0]), checkpoint.load_weights(alone)) > 1e-2
    # Each is a run of its own: continued by the same command, it is found again by its values.
    assert main(tmp_path / "together", *sweep, "--steps", "50") == 0
    assert sorted((tmp_path / "together").glob("*/*/seed*")) == together


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two seeds that nothing happened to."""
    logdir = tmp_path_factory.mktemp("whole")
    assert main(logdir, "--seeds", "2") == 0
    return runs(logdir)


def assert_same_ends(one: dict[int, pathlib.Path], other: dict[int, pathlib.Path]) -> None:
    assert one.keys() == other.keys()
    for seed in one:
        first, second = final(one[seed]), final(other[seed])
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name], err_msg=f"seed {seed}: {name}")
        assert metrics(one[seed]) == metrics(other[seed])


@pytest.mark.parametrize("step", [8, 23])
def test_several_seeds_that_are_killed_go_on_as_if_nothing_had_been(whole, tmp_path, monkeypatch, step):
    def kill():
        raise Killed

    with haunted(monkeypatch, {step: kill}), pytest.raises(Killed):
        main(tmp_path, "--seeds", "2")
    assert main(tmp_path, "--seeds", "2") == 0
    assert_same_ends(runs(tmp_path), whole)


def test_ended_in_the_middle_of_saving_they_go_on_from_the_step_that_all_have(whole, tmp_path, monkeypatch, capsys):
    def kill():
        raise Killed

    with haunted(monkeypatch, {45: kill}), pytest.raises(Killed):
        main(tmp_path, "--seeds", "2")
    found = runs(tmp_path)
    assert steps_saved(found[0]) == steps_saved(found[1])
    older, newest = steps_saved(found[1])
    (found[1] / "checkpoints" / str(newest)).rename(found[1] / "checkpoints" / f"{newest}.partial")
    capsys.readouterr()
    assert main(tmp_path, "--seeds", "2") == 0
    assert capsys.readouterr().out.count(f"going on from step {older}") == 2
    assert_same_ends(runs(tmp_path), whole)


def test_seeds_that_are_finished_are_left_alone(whole, tmp_path, monkeypatch, capfd):
    """Killed in the second evaluation: the first seed has its scores."""
    evaluate, calls = atari100k.evaluate, iter(range(1, 100))

    def killed(*arguments):
        if next(calls) == 2:
            raise Killed
        return evaluate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(atari100k, "evaluate", killed)
        main(tmp_path, "--seeds", "2")
    before = (runs(tmp_path)[0] / "scores.json").read_bytes()
    assert main(tmp_path, "--seeds", "2") == 0
    assert "seed 0 is finished" in capfd.readouterr().err
    assert (runs(tmp_path)[0] / "scores.json").read_bytes() == before
    assert_same_ends(runs(tmp_path), whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--seeds 5000", "at most 1024 agents"),
        ("--seeds 3 --devices 2", "--devices 2: there are 1 here"),
        ("--sweep.tau 10 20 --sweep.entropy-scale 0.1", "--sweep.entropy-scale has 1, --sweep.tau has 2 values"),
        ("--sweep.tau 10 10", "--sweep.tau gives the same agent twice"),
        ("--sweep.tau -3", "agent.replay.tau"),
        ("--sweep.tau ten", "--sweep.tau must be numbers"),
        ("--seeds 2 --seed 2000000000", "seed must lie in"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    assert main(tmp_path, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_is_for_one_agent(whole, capsys):
    assert main(whole[0], "--seeds", "2") == 2
    assert "is the directory of one run, and this command has 2 agents" in capsys.readouterr().err


def test_seeds_that_have_not_begun_cannot_join(tmp_path, monkeypatch, capsys):
    def kill():
        raise Killed

    with haunted(monkeypatch, {23: kill}), pytest.raises(Killed):
        main(tmp_path, "--seeds", "2")
    assert main(tmp_path, "--seeds", "3") == 2
    error = capsys.readouterr().err
    assert "seed 0, seed 1 has begun and seed 2 has not" in error


def test_runs_at_different_steps_are_refused_and_left_as_they_are(tmp_path, monkeypatch, capsys):
    def kill():
        raise Killed

    for seed, step in ((0, 45), (1, 13)):
        with haunted(monkeypatch, {step: kill}), pytest.raises(Killed):
            main(tmp_path, "--seed", str(seed))
    before = {seed: steps_saved(run) for seed, run in runs(tmp_path).items()}
    assert before[1] == [10] and 10 not in before[0]
    assert main(tmp_path, "--seeds", "2") == 2
    assert "cannot go on at step 10, where another agent of this command is" in capsys.readouterr().err
    assert {seed: steps_saved(run) for seed, run in runs(tmp_path).items()} == before


def test_four_devices_give_what_one_gives(whole, tmp_path):
    """In a process of its own, because a CPU is divided into devices when JAX starts."""
    environment = dict(os.environ, **ENVIRONMENT, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    program = "import sys; from experiments import atari100k; sys.exit(atari100k.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *ARGUMENTS, "--logdir", str(tmp_path)]
    done = subprocess.run([*command, "--seeds", "2"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for seed, run in runs(tmp_path).items():
        assert_as_alone(run, whole[seed])
