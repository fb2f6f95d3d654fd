"""Metrics, images and TensorBoard events."""

from __future__ import annotations

import errno
import io
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drama_jax.config import LoggingConfig
from drama_jax.training.images import comparison_strip
from drama_jax.training.logging import MeanMetrics, Progress, Writer, say
from drama_jax.training.tensorboard import Board


def test_mean_metrics_start_anew_after_each_fetch():
    metrics = MeanMetrics()
    assert metrics.fetch() == {}
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": jnp.float32(value), "b": jnp.float32(-value)})
    assert metrics.fetch() == {"a": 3.0, "b": -3.0}
    metrics.add({"a": jnp.float32(5.0), "b": jnp.float32(0.0)})
    assert metrics.fetch() == {"a": 5.0, "b": 0.0}
    assert metrics.fetch() == {}


def test_scalars_go_to_json_lines_and_tensorboard(tmp_path):
    with Writer(tmp_path, LoggingConfig()) as writer:
        writer.scalars(10, 4.00049, {"charts/SPS": 2.5, "world_model/total_loss": np.float32(3.0)})
        writer.scalars(20, 8.0, {"charts/SPS": 4.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "seconds": 4.0, "charts/SPS": 2.5, "world_model/total_loss": 3.0},
        {"step": 20, "seconds": 8.0, "charts/SPS": 4.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("charts/SPS")] == [(10, 2.5), (20, 4.0)]


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
    with Writer(tmp_path, LoggingConfig(tensorboard=False)) as writer:
        writer.scalars(1, 0.5, {"a": math.nan, "b": math.inf, "c": 1.0})
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written == {"step": 1, "seconds": 0.5, "a": None, "b": None, "c": 1.0}
    assert not (tmp_path / "tensorboard").exists()


def test_images_are_files_and_events(tmp_path):
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with Writer(tmp_path, LoggingConfig()) as writer:
        writer.image(5, "world_model/reconstruction", image)
    with Image.open(tmp_path / "images" / "world_model-reconstruction-0000005.png") as stored:
        np.testing.assert_array_equal(np.asarray(stored), image)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Images("world_model/reconstruction")
    assert (event.step, event.height, event.width) == (5, 4, 6)
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
        np.testing.assert_array_equal(np.asarray(shown), image)


def test_a_strip_shows_frames_over_predictions_over_errors():
    truth = np.array([100, 200], np.uint8).reshape(1, 2, 1, 1, 1)
    prediction = np.array([0.5, 1.2]).reshape(1, 2, 1, 1, 1)
    strip = comparison_strip(truth, prediction, gap=1)
    assert strip.shape == (7, 4, 3) and strip.dtype == np.uint8
    np.testing.assert_array_equal(strip[0::2, 0::2, 0], [[100, 200], [128, 255], [28, 55], [0, 0]])
    assert not strip[:, 1::2].any() and not strip[1::2].any()


def test_a_strip_keeps_colours_and_separates_sequences():
    truth = np.zeros((2, 3, 4, 5, 3), np.uint8)
    truth[1, 2, 3, 4] = (1, 2, 3)
    strip = comparison_strip(truth, np.zeros(truth.shape), gap=2)
    height = 3 * (4 + 2) + 2
    assert strip.shape == (2 * height, 3 * (5 + 2), 3)
    np.testing.assert_array_equal(strip[height + 3, 2 * 7 + 4], (1, 2, 3))


def test_the_progress_bar_shows_step_speed_and_last_return(capsys):
    progress = Progress(3, True, "training")
    progress.show(last_return="7")
    for _ in range(3):
        progress.advance()
    progress.say("a message")
    progress.close()
    shown = capsys.readouterr().err
    assert "a message" in shown and "3/3" in shown and "last_return=7" in shown and "step/s" in shown


def test_without_a_bar_messages_are_still_shown(capsys):
    progress = Progress(3, False, "training")
    progress.advance()
    progress.show(last_return="7")
    progress.say("a message")
    progress.close()
    assert capsys.readouterr().err == "a message\n"


def test_a_continued_run_hides_later_events_in_tensorboard(tmp_path):
    for start, value in ((0, 1.0), (10, 2.0)):
        with Writer(tmp_path, LoggingConfig(), start=start) as writer:
            for step in range(start + 5, 25, 5):
                writer.scalars(step, 0.0, {"a": value})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]


def test_a_disk_that_is_full_for_a_while_costs_no_line_of_metrics(tmp_path, monkeypatch):
    said: list[str] = []
    with Writer(tmp_path, LoggingConfig(), say=said.append) as writer:
        writer.scalars(1, 1.0, {"a": 1.0})
        lines, room = writer._lines, 5

        class FullDisk:
            """Takes `room` bytes in all."""

            def write(self, content: bytes) -> int:
                nonlocal room
                if not room:
                    raise OSError(28, "No space left on device")
                written = lines.write(content[:room])
                room -= written
                return written

            close = lines.close

        writer._lines = FullDisk()
        for step in (2, 3):
            writer.scalars(step, float(step), {"a": float(step)})
        room = 1000
        writer.scalars(4, 4.0, {"a": 4.0})
        room = 0
        writer.scalars(5, 5.0, {"a": 5.0})
        writer._lines = lines
        writer.scalars(6, 6.0, {"a": 6.0})
    stored = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert stored == [{"step": step, "seconds": float(step), "a": float(step)} for step in range(1, 7)]
    assert len(said) == 2 and all("No space left on device" in line and "going on" in line for line in said)


def test_tensorboard_starts_another_file_after_an_error(tmp_path):
    board = Board(tmp_path / "events")
    board.scalars(1, {"a": 1.0})

    class Broken:
        def write_event(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    board.close()
    board._writer = Broken()
    with pytest.raises(OSError, match="No space"):
        board.scalars(2, {"a": 2.0})
    board.scalars(3, {"a": 3.0})
    board.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("a")] == [1, 3]


_WITH_TORCH = """
import sys
sys.path.insert(0, {path!r})
from drama_jax.training.tensorboard import Board
board = Board(__import__("pathlib").Path({path!r}) / "events")
board.scalars(1, {{"a": 1.0}})
board.close()
assert "torch" not in sys.modules, "imported, or still hidden"
import torch
Board(__import__("pathlib").Path({path!r}) / "more").close()
assert sys.modules["torch"] is torch
"""


def test_tensorboard_does_not_load_an_installed_torch(tmp_path):
    (tmp_path / "torch.py").write_text("Tensor = None\n")
    code = _WITH_TORCH.format(path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "events").iterdir())


@pytest.mark.parametrize("enabled", [False, True])
def test_a_terminal_that_has_gone_ends_nothing(enabled, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EPIPE, "the reader has gone")

        def flush(self):
            self.write("")

    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(OSError, match="gone"):
        print("a line", file=sys.stderr)
    say("a line")
    say("a line", sys.stderr)
    progress = Progress(3, enabled, "training")
    progress.advance()
    progress.say("a line")
    progress.close()
