"""What the benchmarks say about themselves: the README's tables are those of the result files, floors are counted."""

import argparse
import json
import subprocess

import jax
import pytest

from benchmarks import floors, multi_seed, ssd_check, tables, train_loop
from drama_jax import agent
from drama_jax.config import AutoencoderConfig, preset


def test_the_tables_of_the_readme_are_those_of_the_result_files():
    text = tables.README.read_text()
    assert tables.rewritten(text) == text
    for name in tables.TABLES:
        assert f"<!-- {name} -->" in text


def test_a_table_of_several_files_names_the_commit_of_each(monkeypatch, tmp_path):
    for file, commit, device in (("cpu", "1111111", "cpu"), (tables.CARD, "2222222", "NVIDIA H100 80GB HBM3")):
        row = {"env": "Catch", "preset": "tiny", "seeds": 1, "ms_per_step": 1.0, "steps_per_s": 2.0, "first_chunk_s": 3}
        row |= {"steps_per_cpu_s": None}
        content = {"commit": commit, "device": device, "rows": [row]}
        (tmp_path / f"jax_env-{file}.json").write_text(json.dumps(content))
    monkeypatch.setattr(tables.common, "RESULTS", tmp_path)
    assert tables.filled("jax_env").endswith("Measured at `1111111` (cpu), `2222222` (NVIDIA H100 80GB HBM3).")


def test_a_changed_result_changes_the_table():
    row = {"name": "act", "median_ms": 1.0, "queued_ms": 2.0, "floor_ms": 0.5, "ratio": 2.0}
    assert "| act | 18 | 1.00 | 2.00 | 0.50 | 2.0 | 0.8 |" in tables.stages([row])


def seeds_row(preset: str, seeds: int, ms: float, ratio: float, gigabytes: float, devices: int = 1) -> dict:
    sizes = {"peak_bytes": gigabytes * 1e9, "compiled_bytes": 1}
    speed = {"queued_ms": ms, "steps_per_s": 1e3 * seeds / ms, "ratio": ratio}
    return {"name": f"{seeds} on {devices}", "preset": preset, "seeds": seeds, "devices": devices, **sizes, **speed}


def test_many_seeds_are_held_against_their_bars():
    rows = [seeds_row("xs", 1, 20, 1, 4), seeds_row("xs", 5, 90, 4.5, 20), seeds_row("xs", 12, 240, 12, 90.5)]
    assert multi_seed.answers("xs", rows) == [
        "xs, 5 seeds: times one seed's step: bar <= 5.0, measured 4.50: met",
        "xs, 12 seeds: GB of memory, peak: bar <= 80, measured 90.5: NOT MET",
    ]
    tiny = [seeds_row("tiny", 1, 4, 1, 0.1), seeds_row("tiny", 16, 16, 4, 1)]
    assert multi_seed.answers("tiny", tiny) == [
        "tiny, 16 seeds: times one seed's step: bar <= 3.0, measured 4.00: NOT MET"
    ]
    table = tables.seeds(rows, tiny)
    assert "| xs | 5 | 90.00 | 4.50 | 5.0 | 55.6 | 20.0 | - |" in table
    assert "| xs | 12 | 240.00 | 12.00 | - | 50.0 | 90.5 | 80 |" in table
    assert "| tiny | 16 | 16.00 | 4.00 | 3.0 | 1000.0 | 1.0 | - |" in table


def test_two_devices_are_held_against_one():
    assert multi_seed.cases([5], 2) == [(5, 1), (10, 2)]
    rows = [seeds_row("xs", 5, 100, 5, 20), seeds_row("xs", 10, 104, 5.2, 20, devices=2)]
    (line,) = multi_seed.answers("xs", [*rows[1:], rows[0] | {"ratio": None}])
    assert line == "xs, 10 seeds: times the steps/s of one device with 5: bar >= 1.9, measured 1.92: met"
    assert "| 2 | 10 | 104.00 | 96.2 | 1.92 | 1.9 |" in tables.devices(rows)


def test_scans_are_told_by_shape_and_by_length():
    times = {"forward_ms": 0.03, "forward_ratio": 2.0, "forward_backward_ms": 0.1, "forward_backward_ratio": 3.0}
    case = {"name": "drama_train", "dtype": "bfloat16", "implementation": "pallas", "peak_bytes": 2e6, **times}
    points = [{"name": "sweep", "implementation": name, "T": 128, **times} for name in ("attention", "pallas")]
    fit = {"name": "exponent", "implementation": "pallas", "forward_exponent": 1.0, "forward_backward_exponent": None}
    rows = [case, *points, fit]
    assert tables.scans(rows).splitlines()[2:] == [
        "| drama_train | bfloat16 | pallas | 0.030 | 0.026 | 2.0 | 0.100 | 0.139 | 3.0 | 2.0 |"
    ]
    assert tables.lengths(rows).splitlines()[2:] == [
        "| 128 | 0.030 | 0.100 | 0.030 | 0.100 |",
        "| exponent | - | - | 1.00 | - |",
    ]


def test_a_table_without_results_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.common, "RESULTS", tmp_path)
    assert {tables.filled(name) for name in tables.TABLES} == {"Not measured yet."}


def test_encoder_work_is_that_of_its_layers():
    layers = floors.encoder_layers(AutoencoderConfig(image_size=64, depths=(16, 32)))
    assert layers == [(64 * 64 * 25 * 3 * 16, 64 * 64 * 16), (32 * 32 * 25 * 16 * 32, 32 * 32 * 32)]


def test_the_whole_step_is_the_sum_of_its_two_updates():
    state = jax.eval_shape(lambda key: agent.init(key, preset("xs").agent, 18), jax.random.key(0))
    work = floors.work(state)
    parts = work["world_model_update"], work["imagination_behaviour_update"]
    assert work["environment_step"] == tuple(map(sum, zip(*parts, strict=True)))
    # 1.9 TFLOP a step, of which the autoencoder's training 0.85.
    assert 1.8e12 < work["environment_step"][0] < 2.1e12


def test_programs_are_timed_while_they_are_made():
    def inside(x):
        return 3 * x

    def outside(x):
        return 2 * x

    with train_loop.Made() as made:
        jax.jit(inside)(1.0)
    jax.jit(outside)(1.0)
    programs = made.programs()
    assert "outside" not in programs
    assert set(programs["inside"]) == {"trace_s", "lower_s", "compile_s"}
    assert all(seconds > 0 for seconds in programs["inside"].values())


def test_every_number_of_seeds_has_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    ended = iter(
        [
            (0, 'a remark\n{"seeds": 1, "devices": 1, "queued_ms": 2.0, "steps_per_s": 500.0}\n', ""),
            (1, "", "RESOURCE_EXHAUSTED"),
        ]
    )
    commands, real = [], subprocess.run

    def run(command, **options):
        if command[0] == "git":  # for the commit
            return real(command, **options)
        commands.append(command[command.index("--seeds") + 1])
        assert "--alone" in command and "XLA_PYTHON_CLIENT_PREALLOCATE" not in options["env"]
        code, out, err = next(ended, (1, "", "another mistake"))
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(multi_seed.subprocess, "run", run)
    given = argparse.Namespace(devices=1, seeds=[12, 1], repeats=3, stored=9, out=tmp_path)
    multi_seed.run(given, "tiny", float("inf"))
    assert commands == ["1", "12"]
    (written,) = tmp_path.glob("multi_seed-tiny-*.json")
    assert json.loads(written.read_text())["rows"] == [
        {"seeds": 1, "devices": 1, "queued_ms": 2.0, "steps_per_s": 500.0, "preset": "tiny", "ratio": 1.0}
    ]
    assert "12 seeds on 1 devices do not fit" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another mistake"):
        multi_seed.run(given, "tiny", float("inf"))


def test_a_check_of_no_case_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="drama_train: checked on a GPU only"):
        ssd_check.check(tmp_path, ["drama_train"])
    assert not list(tmp_path.iterdir()) and not jax.config.jax_enable_x64
