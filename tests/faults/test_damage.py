"""Files that are damaged, disks that are full or read-only, and commands that do not fit the run."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from micro import (
    EVERY,
    STEPS,
    Killed,
    assert_same,
    die,
    haunted,
    main,
    only_run,
    steps_saved,
)

from drama_jax.config import ConfigError
from drama_jax.training import checkpoint, config_file, orbax_arrays
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.signals import stop_requested
from tests.tools import metrics_lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an uninterrupted run."""
    logdir = tmp_path_factory.mktemp("whole")
    assert main(logdir) == 0
    return only_run(logdir)


@pytest.fixture(scope="module")
def killed_at_34(tmp_path_factory):
    """The log directory of a run that was killed after the checkpoints 20 and 30."""
    logdir = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch, haunted(patch, {36: die}), pytest.raises(Killed):
        main(logdir)
    assert steps_saved(only_run(logdir)) == [20, 30]
    return logdir


@pytest.fixture
def logdir(killed_at_34, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(killed_at_34, tmp_path / "runs")
    return tmp_path / "runs"


def truncate(path: pathlib.Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return r"has \d+ bytes, not \d+|is damaged"


def flip_a_bit(path: pathlib.Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "SHA-256 differs|is damaged|belongs to|bytes, not|is missing|format"


def remove(path: pathlib.Path) -> str:
    path.unlink()
    return "is missing"


def replace_by_another(path: pathlib.Path) -> str:
    path.write_bytes(b"Dear diary")
    return r"has 10 bytes, not \d+|is damaged"


def largest(directory: pathlib.Path) -> pathlib.Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


FILES = {
    "agent": lambda run: largest(run / "checkpoints" / "30" / "agent"),
    "metadata": lambda run: run / "checkpoints" / "30" / "agent" / "_METADATA",
    "loop.npz": lambda run: run / "checkpoints" / "30" / "loop.npz",
    "manifest.json": lambda run: run / "checkpoints" / "30" / "manifest.json",
    "19-29.npz": lambda run: run / "replay" / "19-29.npz",
}


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove, replace_by_another])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(logdir, name, damage):
    run = only_run(logdir)
    path = FILES[name](run)
    what = damage(path)
    messages: list[str] = []
    snapshot, segments = checkpoint.load(run, config_file.read(run)["id"], messages.append)
    assert snapshot.step == 20 and segments[-1].stop == 19
    (message,) = messages
    assert path.name in message and re.search(what, message) and "checkpoint 20 is used" in message
    assert "\n" not in message
    # What is damaged is kept, out of the way.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "30.damaged"]


def test_a_foreign_file_is_named(logdir):
    run = only_run(logdir)
    (run / "checkpoints" / "30" / "agent" / "stowaway").write_text("")
    messages: list[str] = []
    snapshot, _ = checkpoint.load(run, config_file.read(run)["id"], messages.append)
    assert snapshot.step == 20 and "agent/stowaway does not belong to it" in messages[0]


def test_a_checkpoint_of_another_run_or_step_is_not_taken(logdir, whole):
    run = only_run(logdir)
    shutil.copytree(whole / "checkpoints" / "40", run / "checkpoints" / "40")
    shutil.copytree(run / "checkpoints" / "20", run / "checkpoints" / "35")
    messages: list[str] = []
    snapshot, _ = checkpoint.load(run, config_file.read(run)["id"], messages.append)
    assert snapshot.step == 30
    assert [re.sub(".* (belongs to [a-z ]+).*", r"\1", message) for message in messages] == [
        "belongs to another run",
        "belongs to step ",
    ]


def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_bits(logdir, whole, capsys):
    flip_a_bit(FILES["agent"](only_run(logdir)))
    assert main(logdir) == 0
    output = capsys.readouterr()
    assert "going on from step 20" in output.out and output.err.count("SHA-256 differs") == 1
    assert_same(only_run(logdir), whole)


def test_without_any_whole_checkpoint_nothing_starts_and_nothing_is_removed(logdir, capsys):
    run = only_run(logdir)
    flip_a_bit(FILES["loop.npz"](run))
    remove(run / "checkpoints" / "20" / "loop.npz")
    before = sorted(run.rglob("*"))
    assert main(logdir) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--no-resume" in error and "backup" in error
    assert "checkpoint 30: loop.npz" in error and "checkpoint 20: loop.npz is missing" in error
    assert sorted(run.rglob("*")) == before
    with pytest.raises(ConfigError, match="no checkpoint can be used"):
        checkpoint.load_weights(run)


def test_the_weights_of_the_newest_whole_checkpoint_are_loaded(logdir):
    run = only_run(logdir)
    good = checkpoint.load_weights(run, step=20)["behaviour"]["params"]["actor"]
    flip_a_bit(FILES["agent"](run))
    for part in (run, run / "checkpoints", run / "checkpoints" / "20"):
        loaded = checkpoint.load_weights(part)["behaviour"]["params"]["actor"]
        np.testing.assert_equal(loaded, good)
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        checkpoint.load_weights(run / "checkpoints" / "30")


@contextlib.contextmanager
def small_disk(path: pathlib.Path, megabytes: int):
    """A file system of its own at `path`; skips the test where mounting is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def saving_synchronously(monkeypatch):
    """A save has ended before the next step, so that a test knows what it meets."""
    save = Checkpoints.save

    def saved(self, snapshot):
        save(self, snapshot)
        self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved)
        yield


def fill(disk: pathlib.Path) -> None:
    """Takes every byte that is left."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(whole, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", 8) as disk:
        # Full when checkpoint 20 is due; free again before 30.
        events = {17: lambda: fill(disk), 28: (disk / "filler").unlink}
        with haunted(monkeypatch, events), saving_synchronously(monkeypatch):
            assert main(disk) == 0
        error = capsys.readouterr().err.splitlines()
        assert [line.split(" could not be saved (")[0] for line in error if "checkpoint" in line] == ["checkpoint 20"]
        # The log may have found room on a page of its own.
        assert all("No space left on device" in line for line in error) and len(error) <= 2
        run = only_run(disk)
        assert_same(run, whole)
        assert not list(run.rglob("*.partial"))


# Threads of tensorstore complain after the error that counts.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_while_orbax_writes_leaves_the_previous_checkpoint(logdir, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_arrays, "_check_space", lambda *_: None)
    messages: list[str] = []
    with small_disk(tmp_path / "disk", 8) as disk:
        run = disk / "run"
        shutil.copytree(only_run(logdir), run)
        fill(disk)
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - 100_000)
        identity = config_file.read(run)["id"]
        found, segments = checkpoint.load(run, identity)
        noise = np.random.default_rng(0)
        device = {name: noise.normal(size=(1000, *array.shape)) for name, array in found.device.items()}
        checkpoints = Checkpoints(run, identity, 25, segments, messages.append)
        checkpoints.save(checkpoint.Snapshot(31, found.end, device, {}, {}))
        checkpoints.close()
        assert "No space left on device" in checkpoints.error and len(messages) == 1 and "\n" not in messages[0]
        assert checkpoint.load(run, identity)[0].step == 30


# A write that orbax has given up may end after its event loop is closed, which asyncio reports in passing.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_the_last_checkpoint_not_saved_is_exit_code_1_and_can_be_repeated(whole, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", 8) as disk:
        with haunted(monkeypatch, {47: lambda: fill(disk)}), saving_synchronously(monkeypatch):
            assert main(disk, "--eval-episodes", "0") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and "No space left on device" in error
        assert steps_saved(only_run(disk)) == [30, 40]
        (disk / "filler").unlink()
        assert main(disk) == 0
        assert_same(only_run(disk), whole)


def test_a_read_only_log_directory_is_named_before_anything_starts(tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", 4) as disk:
        with haunted(monkeypatch, {12: die}), pytest.raises(Killed):
            main(disk)
        capsys.readouterr()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for directory in (disk / "new", disk, only_run(disk)):
            assert main(directory) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and str(directory) in error and "cannot be written to" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "--agent.replay.capacity 30",
            "--agent.replay.capacity: the run in .* has 25, given 30; only steps, evaluation",
        ),
        ("--agent.behaviour.lambda_ 0.9", "--agent.behaviour.lambda_: .* has 0.95, given 0.9"),
        ("--atari.sticky-actions 0.25", "--atari.sticky-actions: .* has 0.0, given 0.25"),
        ("--env-backend ale", "--atari.backend: .* has envpool, given ale"),
        (
            "--agent.world-model.autoencoder.depths 2 6",
            r"--agent.world-model.autoencoder.depths: .* has \[2, 4\], given",
        ),
        ("--steps 20", "--steps 20: the run in .* has done 30 steps already"),
        ("--no-resume --logdir RUN", "--no-resume: RUN holds a run already"),
        ("--seed 3 --logdir RUN", "--seed: the run in RUN has 0, given 3"),
        ("--game Pong --logdir RUN", "--game: the run in RUN has Breakout, given Pong"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_with_both_values(killed_at_34, capsys, more, message):
    run = only_run(killed_at_34)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    assert main(killed_at_34, *more.replace("RUN", str(run)).split()) == 2
    output = capsys.readouterr()
    assert output.out == "" and re.match("error: " + message.replace("RUN", re.escape(str(run))), output.err)
    assert output.err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}


def test_what_may_change_is_taken_and_written_down(logdir, capsys):
    assert main(logdir, "--logging.metrics-every", "5", "--steps", "36", "--eval-episodes", "0") == 0
    run = only_run(logdir)
    error = capsys.readouterr().err
    for line in ("--logging.metrics-every 5 (was 7)", f"--steps 36 (was {STEPS})", "--evaluation.episodes 0 (was 2)"):
        assert line in error
    assert [line["step"] for line in metrics_lines(run) if "replay/size" in line][-2:] == [35, 36]
    content = json.loads((run / "config.json").read_text())
    assert content["config"]["logging"]["metrics_every"] == 5
    assert content["continued"][-1]["changed"]["logging/metrics_every"] == [7, 5]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"game": "Breakout"}', '{"game": "Breakout", "preset": "tiny", "config": 3, "id": ""}']
)
def test_a_damaged_config_is_one_line(logdir, capsys, content):
    (only_run(logdir) / "config.json").write_text(content)
    assert main(logdir) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json was not written by this version" in error and "--no-resume" in error


def test_no_resume_starts_beside_the_other_run(logdir):
    with pytest.MonkeyPatch.context() as patch, haunted(patch, {EVERY: die}), pytest.raises(Killed):
        main(logdir, "--no-resume")
    assert len(list(logdir.glob("*/*/seed*"))) == 2


def test_the_first_signal_asks_and_the_second_ends():
    code = (
        "import os, signal, sys\n"
        "from drama_jax.training.signals import stop_requested\n"
        "with stop_requested() as stop:\n"
        "    assert not stop()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('asked' if stop() else '', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "asked\n")
    assert "SIGINT: finishing the step and saving" in done.stderr


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requested() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
