"""A run that is interrupted ends with the same bits as one that is not."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal

import numpy as np
import pytest
from micro import (
    ARGUMENTS,
    STEPS,
    Killed,
    assert_same,
    die,
    final,
    haunted,
    main,
    only_run,
    steps_saved,
)

from drama_jax.envs import envpool_backend
from drama_jax.training import replay_log, run_directory
from experiments import atari100k, machine
from tests.tools import metrics_lines

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["envpool", "ale"])
def whole(request, tmp_path_factory):
    """(backend, run directory) of an uninterrupted run."""
    logdir = tmp_path_factory.mktemp("whole")
    assert main(logdir, "--env-backend", request.param) == 0
    return request.param, only_run(logdir)


@pytest.fixture(scope="module")
def envpool_run(tmp_path_factory):
    """The directory of an uninterrupted run through EnvPool."""
    logdir = tmp_path_factory.mktemp("whole")
    assert main(logdir) == 0
    return only_run(logdir)


def test_a_run_killed_again_and_again_ends_the_same(whole, tmp_path, monkeypatch, capsys):
    backend, uninterrupted = whole
    starts = []
    # In the warm-up before the first checkpoint, in the warm-up after it, and twice later, where the ring has wrapped.
    for steps in (5, 13, 17, 14):
        with haunted(monkeypatch, {steps: die}), pytest.raises(Killed):
            main(tmp_path, "--env-backend", backend)
        starts.append(newest(tmp_path))
    assert starts == [0, 10, 20, 30]
    assert main(tmp_path, "--env-backend", backend) == 0
    run = only_run(tmp_path)
    assert_same(run, uninterrupted)
    output = capsys.readouterr().out
    assert "going on from step 0, as it has no checkpoint yet" in output and "going on from step 30\n" in output
    continued = json.loads((run / "config.json").read_text())["continued"]
    assert [part["step"] for part in continued] == [0, 10, 20, 30] and continued[0]["versions"]
    # What was logged after the last checkpoint is not lost.
    assert len((run / "metrics-cut.jsonl").read_text().splitlines()) > 0


@contextlib.contextmanager
def handled(number):
    """As where it is not ignored, which SIGHUP is under nohup."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        yield
        return
    signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_step_and_the_command_it_prints_goes_on(envpool_run, tmp_path, monkeypatch, capsys, number):
    logdir = tmp_path / "it's a directory"

    def send():
        for _ in range(2 if number == signal.SIGHUP else 1):  # what a shell does that is closed
            os.kill(os.getpid(), number)

    with handled(number), haunted(monkeypatch, {25: send}):
        before = signal.getsignal(number)
        assert main(logdir, "--no-resume") == 0
        assert signal.getsignal(number) is before
    # The 25th call of the emulator is that of step 24: the first episode's end took one.
    assert steps_saved(only_run(logdir)) == [20, 24]
    output = capsys.readouterr()
    command = output.out.splitlines()[-1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "experiments.atari100k"] and "--no-resume" not in words
    assert atari100k.main(words[3:]) == 0
    assert_same(only_run(logdir), envpool_run)


def test_a_signal_in_the_evaluation_repeats_only_that(envpool_run, tmp_path, monkeypatch, capsys):
    with haunted(monkeypatch, {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}, evaluation=True):
        assert main(tmp_path) == 0
    assert steps_saved(only_run(tmp_path)) == [40, STEPS] and not (only_run(tmp_path) / "scores.json").exists()
    assert "to continue" in capsys.readouterr().out
    with haunted(monkeypatch, {1: die}):  # the training environment is not played any more
        assert main(tmp_path) == 0
    assert_same(only_run(tmp_path), envpool_run)


def test_an_emulator_that_fails_ends_the_run_and_can_go_on(tmp_path, monkeypatch, capsys):
    def fail() -> None:
        raise RuntimeError("a cosmic ray")

    with haunted(monkeypatch, {26: fail}):
        assert main(tmp_path) == 1
    run = only_run(tmp_path)
    error = capsys.readouterr().err
    assert error.startswith("error: the emulator failed in step 24: RuntimeError: a cosmic ray. ")
    assert str(run) in error and error.count("\n") == 1
    assert steps_saved(run) == [20, 24]
    assert main(tmp_path) == 0
    assert "going on from step 24" in capsys.readouterr().out and steps_saved(run) == [40, STEPS]
    assert [line["step"] for line in metrics_lines(run)] == sorted(line["step"] for line in metrics_lines(run))


def test_an_emulator_that_fails_in_the_evaluation_is_one_line(tmp_path, monkeypatch, capsys):
    def fail() -> None:
        raise ValueError("worn out")

    with haunted(monkeypatch, {3: fail}, evaluation=True):
        assert main(tmp_path) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: the emulator failed in the evaluation: ValueError: worn out")
        and error.count("\n") == 1
    )


@pytest.mark.parametrize("backend", ["envpool", "ale"])
def test_another_emulator_cuts_the_episode_and_goes_on(tmp_path, monkeypatch, capsys, backend):
    with haunted(monkeypatch, {24: die}), pytest.raises(Killed):
        main(tmp_path, "--env-backend", backend)
    with monkeypatch.context() as patch:
        if backend == "envpool":
            patch.setattr(envpool_backend, "_version", lambda: "9.9")
        else:
            patch.setattr("ale_py.__version__", "9.9")
        assert main(tmp_path, "--env-backend", backend, "--steps", "25") == 0
    line = [line for line in capsys.readouterr().err.splitlines() if "cannot be brought back" in line]
    assert len(line) == 1 and "9.9" in line[0] and "truncated" in line[0]
    run = only_run(tmp_path)
    firsts, terminals = rows(run, "firsts"), rows(run, "terminals")
    # Step 20 is the seventh of the second episode; now it begins a third one, and the one before it is no terminal.
    assert np.flatnonzero(firsts).tolist() == [0, 13, 20] and not terminals[19]
    assert lengths(run) == [13.0]


def test_a_picture_that_differs_cuts_the_episode(tmp_path, monkeypatch, capsys):
    with haunted(monkeypatch, {24: die}), pytest.raises(Killed):
        main(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(envpool_backend, "_digest", lambda observation: "another")
        assert main(tmp_path) == 0
    assert "played again, do not lead to the same picture" in capsys.readouterr().err


def rows(run, name):
    """A column of the replay, of the whole run; none of it may have been removed yet."""
    segments = sorted((run / "replay").iterdir(), key=lambda path: int(path.name.split("-")[0]))
    return np.concatenate([np.load(path)[name] for path in segments])


def newest(logdir):
    """Step of the newest checkpoint; 0 if there is none."""
    folder = only_run(logdir) / "checkpoints"
    return max(steps_saved(only_run(logdir)), default=0) if folder.exists() else 0


def lengths(run):
    return [line["charts/episodic_length"] for line in metrics_lines(run) if "charts/episodic_length" in line]


def test_a_second_process_is_refused(tmp_path, monkeypatch, capsys):
    with haunted(monkeypatch, {12: die}), pytest.raises(Killed):
        main(tmp_path)
    run = only_run(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    with run_directory.lock(run):
        assert main(tmp_path) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert f"process {os.getpid()} on " in output.err and "--no-resume" in output.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == {
        path: content if path.name != "lock" else path.read_bytes() for path, content in before.items()
    }


def test_more_steps_continue_a_finished_run_and_the_same_command_starts_another(tmp_path, capsys):
    assert main(tmp_path, "--steps", "20") == 0
    run = only_run(tmp_path)
    assert main(tmp_path, "--steps", "25", "--eval-episodes", "1") == 0
    assert only_run(tmp_path) == run and steps_saved(run) == [20, 25]
    output = capsys.readouterr()
    assert "--steps 25 (was 20)" in output.err and "--evaluation.episodes 1 (was 2)" in output.err
    assert json.loads((run / "scores-20.json").read_text())["steps"] == 20
    assert json.loads((run / "scores.json").read_text())["steps"] == 25
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["steps"] == 25 and saved["continued"][0]["changed"]["steps"] == [20, 25]
    evaluated = [line["step"] for line in metrics_lines(run) if "eval/episodic_return" in line]
    assert evaluated == [20, 25]
    assert main(tmp_path, "--steps", "20") == 0
    assert f"{run} is finished; this is a new run" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/*/seed*"))) == 2
    assert atari100k.main([*ARGUMENTS, "--logdir", str(run), "--steps", "25"]) == 2
    assert "is finished" in capsys.readouterr().err


def test_every_command_of_the_readme_does_what_it_says(tmp_path, monkeypatch, capsys):
    """In order, with the smallest sizes; preset xs becomes tiny, and 120,000 steps become 52."""
    section = README.split("## Long runs")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    small = [word for word in ARGUMENTS if word not in ("--game", "Breakout")]

    def run(line: str) -> str:
        directory = next(iter(sorted(tmp_path.glob("runs/Breakout/tiny/*"))), tmp_path)
        line = line.replace("runs/Breakout/xs/seed0-<time>", str(directory)).replace("120000", "52")
        program, *arguments = shlex.split(line, comments=True)
        assert program == "python"
        if arguments[0] == "-c":
            exec(compile(arguments[1], "README.md", "exec"), {})
        else:
            assert arguments[:2] == ["-m", "experiments.atari100k"]
            assert atari100k.main([*small, *arguments[2:]]) == 0
        output = capsys.readouterr()
        return output.out + output.err

    start, further, this, beside, deterministic, weights = block.splitlines()
    with haunted(monkeypatch, {24: die}), pytest.raises(Killed):
        run(start)
    assert "going on from step 20" in run(start)
    assert "--steps 52 (was 48)" in run(further)
    (tmp_path / "runs/Breakout/tiny").joinpath(os.listdir("runs/Breakout/tiny")[0], "scores.json").unlink()
    assert "going on from step 52" in run(this.replace(" --logdir", " --steps 52 --logdir"))
    assert "run directory" in run(beside) and len(os.listdir("runs/Breakout/tiny")) == 2
    assert "this run" in run(deterministic) and "xla_gpu_deterministic_ops=true" in os.environ["XLA_FLAGS"]
    assert "world_model" in run(weights)


def test_another_seed_is_another_run(envpool_run, tmp_path):
    assert main(tmp_path, "--seed", "1") == 0
    one, two = final(envpool_run), final(only_run(tmp_path))
    kernels = [name for name in one if "/params/" in name and name.endswith("kernel")]
    assert kernels and not any(np.array_equal(one[name], two[name]) for name in kernels)
    assert not np.array_equal(one["actions"], two["actions"])


def test_flags_of_xla_that_are_set_already_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    for deterministic in (False, True, True):
        machine.set_xla_flags(deterministic=deterministic)
    added = "--xla_gpu_enable_triton_gemm=false --xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x {added} --xla_gpu_deterministic_ops=true"
    own = "--xla_gpu_command_buffer_scheduling_mode=LHS --xla_gpu_enable_triton_gemm=true"
    monkeypatch.setenv("XLA_FLAGS", own)
    machine.set_xla_flags(deterministic=False)
    assert os.environ["XLA_FLAGS"] == own
    monkeypatch.delenv("XLA_FLAGS")
    machine.set_xla_flags(deterministic=False, agents=2)
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=false"


def test_the_parts_of_a_segment_are_the_rows_of_the_run():
    assert replay_log.parse_name("replay/3-5.npz") == replay_log.Segment(3, 5)
    for name in ("replay/a-5.npz", "replay/3.npz", "other/3-5.npz", "../3-5.npz"):
        assert replay_log.parse_name(name) is None
