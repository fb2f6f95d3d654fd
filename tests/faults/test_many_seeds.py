"""Several agents in one process: each as if it were alone, also when the process is killed, and on several devices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from micro import ARGUMENTS, Killed, final, haunted, main, steps_saved

import experiments.runs
from drama_jax.config import ConfigError
from drama_jax.training import arrays, checkpoint, programs
from drama_jax.training.together import Together
from experiments import atari_options, meeting, memory, runner, sweep
from experiments.processes import Distributed
from tests.tools import metrics_but_for_the_clock

UPDATES = 200
LIMIT_S = 300.0
HERE = "--distributed.coordinator localhost:1 --distributed.processes 2"
LONG = f"--steps {14 + UPDATES} --logging.checkpoint-every 500".split()


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
    lines, wanted = metrics_but_for_the_clock(run), metrics_but_for_the_clock(alone)
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
        assert metrics_but_for_the_clock(one[seed]) == metrics_but_for_the_clock(other[seed])


def test_the_update_is_compiled_once_for_its_memory_and_for_the_loop(whole, caplog):
    """The check asks for the program that the loop of `whole` has run, so JAX has it already."""
    _, config = atari_options.parse(ARGUMENTS, "x")
    with jax.log_compiles():
        states, at_once = programs.update_bytes(config.agent, 4, Together(2))
    assert not [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert states > 2 * sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs.shapes(config.agent, 4).replay)
    )
    assert at_once > 1.5 * states


@pytest.mark.parametrize(
    ("free", "agents", "error"),
    [
        (400, 4, None),
        (390, 4, "--seeds: 4 agents need 400 bytes of device memory, but 390 are free; at most 3 fit on one device"),
        (219, 4, "at most 1 fit on one device"),
        (90, 2, "at most 0 fit on one device"),
        (90, 1, "--agent: an agent needs 130 bytes of device memory, but 90 are free; lower the batch sizes or"),
    ],
)
def test_agents_whose_update_does_not_fit_are_refused_with_the_number_that_fits(monkeypatch, free, agents, error):
    """Each takes 90 bytes, and all together another 40."""
    monkeypatch.setattr(memory, "_BESIDES", 1.0)
    monkeypatch.setattr(programs, "update_bytes", lambda _, __, together: (1, 40 + 90 * together.count))
    stats = {"bytes_limit": free + 5, "bytes_in_use": 5}
    expected = pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext()
    with expected:
        memory.check_update(None, 4, Together(agents), stats)
    memory.check_update(None, 4, Together(agents), None)


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
    evaluate, calls = runner.evaluate, iter(range(1, 100))

    def killed(*arguments):
        if next(calls) == 2:
            raise Killed
        return evaluate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runner, "evaluate", killed)
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
        ("--distributed.processes 2", "--distributed.processes 2 needs --distributed.coordinator HOST:PORT, or auto"),
        ("--distributed.coordinator here", "--distributed.coordinator 'here': must be HOST:PORT of process 0, or auto"),
        ("--distributed.coordinator a:1 --distributed.processes 2", "--distributed.process is missing"),
        ("--distributed.coordinator a:1 --distributed.processes 0", "--distributed.processes 0: must be at least 1"),
        (f"{HERE} --distributed.process 2", "--distributed.process 2: must be from 0 to one less"),
        (f"{HERE} --distributed.process 0 --distributed.timeout 0", "--distributed.timeout 0: must be at least 1"),
        (f"{HERE} --distributed.process 0", "2 processes have 1 agents; start as many processes at most"),
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
    process = started(tmp_path, "--seeds 2", JAX_NUM_CPU_DEVICES="4")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    for seed, run in runs(tmp_path).items():
        assert_as_alone(run, whole[seed])


def started(logdir: pathlib.Path, flags: str, **environment: str) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.atari100k", *ARGUMENTS, "--logdir", str(logdir), *flags.split()],
        cwd=pathlib.Path(__file__).parents[2],
        env=dict(os.environ, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_address() -> str:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return f"localhost:{taken.getsockname()[1]}"


def test_two_processes_give_what_one_gives(whole, tmp_path):
    together = f"--seeds 2 --distributed.coordinator {free_address()} --distributed.processes 2"
    both = [started(tmp_path, f"{together} --distributed.process {number}") for number in (0, 1)]
    outputs = [process.communicate(timeout=LIMIT_S)[0] for process in both]
    for number, (process, output) in enumerate(zip(both, outputs)):
        assert process.returncode == 0, output
        assert f"process {number} of 2: seed {number}\n" in output
    found = runs(tmp_path)
    assert found.keys() == whole.keys()
    for seed, run in found.items():
        assert_as_alone(run, whole[seed])


def test_processes_that_were_started_differently_do_not_begin(monkeypatch):
    monkeypatch.setattr(meeting, "_AGREE_S", 1)
    address = free_address()

    def meet(number: int) -> str:
        wanted = Distributed(address, processes=2, process=number, timeout=60)
        with pytest.raises(ConfigError) as caught:
            meeting.meet(wanted, f"{number + 2} seeds")
        return str(caught.value)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for message in pool.map(meet, (0, 1)):
            assert "the processes were not all started with the same command" in message


def test_processes_that_do_not_meet_say_so_in_a_line():
    wanted = Distributed(free_address(), processes=2, process=1, timeout=1)
    with pytest.raises(ConfigError, match="the 2 processes did not meet there within 1 s; it cannot be reached, or"):
        meeting.meet(wanted, "a command")


def test_a_cluster_says_which_process_and_which_device_it_is(monkeypatch):
    slurm = {"JOB_ID": 4242, "STEP_NODELIST": "localhost", "NTASKS": 1, "PROCID": 0, "LOCALID": 3}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert meeting.meet(Distributed("auto", timeout=60), "a command") == meeting.Place(0, 1, "3")


@pytest.mark.parametrize("done", [{0}, {1}, {0, 1}])
def test_a_process_leaves_its_finished_agents_alone(tmp_path, monkeypatch, done):
    """Whatever the others' are: if all were begun anew, it would depend on who looks first."""
    flags = ["--seeds", "2", "--distributed.coordinator", "localhost:1", "--distributed.processes", "2"]
    options, config = atari_options.parse([*ARGUMENTS, *flags, "--distributed.process", "0"], "x")
    planned = sweep.plan(config, options.seeds, options.sweep)
    monkeypatch.setattr(experiments.runs, "finished", lambda _, __, one: tmp_path if one.config.seed in done else None)
    with contextlib.ExitStack() as stack:
        options = dataclasses.replace(options, logdir=tmp_path)
        found = experiments.runs.prepare(options, "Breakout", planned, stack, shared=options.distributed.shared)
    assert {one.config.seed for one in found} == {0, 1} - done
