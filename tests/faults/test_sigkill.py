"""Real processes and real signals. Every run must end with the bits of one that nobody disturbed, in another process.

A process takes ten seconds or more to start and compile, so the default suite kills only a few of them.
"""

from __future__ import annotations

import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from micro import ARGUMENTS, assert_same, main, only_run

ROOT = pathlib.Path(__file__).parents[2]
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an uninterrupted run of seed 0, in this process."""
    logdir = tmp_path_factory.mktemp("whole")
    assert main(logdir) == 0
    return only_run(logdir)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where the processes keep what they have compiled."""
    return tmp_path_factory.mktemp("compiled")


def environment(compiled: pathlib.Path) -> dict[str, str]:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache


def start(logdir: pathlib.Path, compiled: pathlib.Path) -> subprocess.Popen[str]:
    """The program in a process of its own; on a CPU `--deterministic` must change nothing."""
    command = [sys.executable, "-m", "experiments.atari100k", *ARGUMENTS, "--logdir", str(logdir), "--deterministic"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(compiled),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Looks often enough to find a checkpoint that is being written; gives up when the process has ended."""
    deadline = time.monotonic() + LIMIT_S
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def partial(logdir: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that are being written."""
    return list(logdir.glob("*/*/seed*/checkpoints/*.partial"))


def saved(logdir: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [int(path.name) for path in logdir.glob("*/*/seed*/checkpoints/*") if path.name.isdecimal()]


def test_killed_in_a_save_and_at_another_moment_then_stopped_the_run_ends_the_same(whole, compiled, tmp_path):
    process = start(tmp_path, compiled)
    wait_until(process, lambda: any(path.name == "20.partial" for path in partial(tmp_path)))
    kill(process)
    assert saved(tmp_path) == [10] or max(saved(tmp_path)) == 20  # the rename may have come first

    process = start(tmp_path, compiled)
    lock = only_run(tmp_path) / "lock"
    wait_until(process, lambda: f"process {process.pid} on " in lock.read_text())
    process.send_signal(signal.SIGSTOP)
    output, _ = (refused := start(tmp_path, compiled)).communicate(timeout=LIMIT_S)
    process.send_signal(signal.SIGCONT)
    assert refused.returncode == 2 and f"is in use by process {process.pid} on " in output

    wait_until(process, lambda: max(saved(tmp_path)) >= 30)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    program = shlex.quote(sys.executable) + output.splitlines()[-1].removeprefix("python")
    subprocess.run(["bash", "-c", program], cwd=ROOT, env=environment(compiled), check=True)
    assert_same(only_run(tmp_path), whole)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(whole, compiled, tmp_path):
    choose = random.Random(0)
    kills_in_a_save = 0
    for number in range(20):
        process = start(tmp_path / "killed", compiled)
        before = max(saved(tmp_path), default=0)
        if number % 3:
            time.sleep(choose.uniform(1.0, 12.0))
        else:
            wait_until(process, lambda: bool(partial(tmp_path / "killed")))
            time.sleep(choose.uniform(0.0, 0.1))
            kills_in_a_save += bool(partial(tmp_path / "killed"))
        kill(process)
        assert max(saved(tmp_path), default=0) >= before
        if (tmp_path / "killed").exists() and list(tmp_path.glob("killed/*/*/*/scores.json")):
            assert_same(only_run(tmp_path / "killed"), whole)
            (tmp_path / "killed").rename(tmp_path / f"finished-{number}")
    if not list(tmp_path.glob("killed/*/*/*/scores.json")):
        output, _ = (process := start(tmp_path / "killed", compiled)).communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
    assert_same(only_run(tmp_path / "killed"), whole)
    assert kills_in_a_save > 0
