"""`experiments.grid_world`: what is predicted and counted, one study at the smallest size, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.config import preset
from experiments import grid_world, grid_world_costs, grid_world_report
from experiments import grid_world_model as model

OPTIONS = grid_world.Options()


@pytest.fixture(scope="module")
def config():
    """A transformer for two sequences of three frames."""
    backbone = dataclasses.replace(preset("tiny", "transformer").agent.world_model.backbone, num_layers=1)
    config = model.StudyConfig(backbone, frames=3, batch_size=2)
    return dataclasses.replace(config, backbone=dataclasses.replace(backbone, max_length=config.num_tokens))


@pytest.fixture(scope="module")
def made(config):
    """Two walks."""
    return jax.jit(lambda key: model.walks(config, key, 2))(jax.random.key(0))


@pytest.fixture(scope="module")
def params(config):
    return jax.jit(lambda key: model.init(config, key))(jax.random.key(1)).params


def test_sequences_have_the_lengths_of_the_study():
    lengths = [grid_world.study_config(OPTIONS, "mamba2", frames, 1).num_tokens for frames in OPTIONS.frames]
    assert lengths == [208, 1664]


def test_every_backbone_is_of_matched_size_and_takes_the_whole_sequence():
    for name in OPTIONS.backbones:
        config = grid_world.study_config(OPTIONS, name, 64, 1)
        assert (config.backbone.name, config.backbone.width, config.backbone.max_length) == (name, 64, 1664)
        matched = dataclasses.replace(preset("tiny", name).agent.world_model.backbone, max_length=1664)
        assert config.backbone == matched


def test_a_cell_is_predicted_after_the_token_before_it(config, made, params):
    logits, targets = jax.jit(lambda tokens: model.predictions(config, params, tokens))(made.tokens)
    assert logits.shape == (2, 2, 25, 9)
    np.testing.assert_array_equal(targets, made.frames[:, 1:])
    module = model.TokenModel(config)
    every = jax.jit(lambda tokens: module.apply(params, tokens))(made.tokens[:, :-1])
    # The first cell of the second frame follows token 25, the first action; its last one follows the cell before it.
    np.testing.assert_allclose(logits[:, 0, 0], every[:, 25], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[:, 0, 24], every[:, 49], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[:, 1, 0], every[:, 51], rtol=0, atol=1e-5)
    other = made.tokens.at[:, 51].set(made.tokens[:, 51] % 4 + 5)  # the second action decides about the third frame
    changed, _ = jax.jit(lambda tokens: model.predictions(config, params, tokens))(other)
    np.testing.assert_array_equal(changed[:, 0], logits[:, 0])
    assert np.abs(changed[:, 1] - logits[:, 1]).min(axis=(0, 2)).max() > 1e-4


def test_single_steps_predict_what_the_sequence_does(config, made, params):
    module, tokens = model.TokenModel(config), made.tokens[:, :60]

    def steps(tokens):
        def body(memory, now):
            token, place = now
            logits, memory = module.apply(params, token, jnp.full(2, place), memory, method="step")
            return memory, logits

        memory = module.apply(params, 2, method="initial_state")
        return jax.lax.scan(body, memory, (tokens.T, jnp.arange(60, dtype=jnp.int32) % 26))[1].swapaxes(0, 1)

    every = jax.jit(lambda tokens: module.apply(params, tokens))(tokens)
    np.testing.assert_allclose(jax.jit(steps)(tokens), every, rtol=0, atol=1e-5)


def test_errors_are_counted_by_gap(config):
    # Cells shown: 12 (colour 3), 7 (2, new), 7 again (the wall: one back); and 12 (1), 13 (4, new), 12 (two back).
    shown = [[(12, 3), (7, 2), (7, 2)], [(12, 1), (13, 4), (12, 1)]]
    frames = np.zeros((2, 3, 25), np.int32)
    for walk, cells in enumerate(shown):
        for time, (cell, colour) in enumerate(cells):
            frames[walk, time, cell] = colour
    made = model.Walks(tokens=None, frames=jnp.asarray(frames), gaps=jnp.array([[0, 0, 1], [0, 0, 2]]))
    # First walk: the second frame has the wrong colour, the third is right. Second walk: the second frame is right but
    # for another cell; in the third the agent is thought elsewhere, though the best colour there is right.
    guess = frames[:, 1:].copy()
    guess[0, 0, 7] = 4
    guess[1, 0, 0] = 1
    logits = 9.0 * np.eye(9, dtype=np.float32)[guess]
    logits[1, 1, 12] = [5, 2, 1, 0, 0, 0, 0, 0, 0]
    errors = model.count_errors(config, jnp.asarray(logits), made)
    assert {name: counts.tolist() for name, counts in vars(errors).items()} == {
        "frames": [2, 1, 1],
        "colour": [1, 0, 0],
        "cell": [1, 0, 1],
        "frame": [2, 0, 1],
    }


def test_gaps_are_grouped_by_powers_of_two():
    groups = [grid_world_report.bin_name(*group) for group in grid_world_report.bins(64)]
    assert groups == ["never", "1", "2-3", "4-7", "8-15", "16-31", "32-63"]
    assert grid_world_report.bins(6) == [(0, 0), (1, 1), (2, 3), (4, 5)]
    assert grid_world_report.bins(2) == [(0, 0), (1, 1)]
    counts = np.arange(12).reshape(2, 6)
    assert grid_world_report.binned(counts, 6) == [[0, 1, 5, 9], [6, 7, 17, 21]]


def test_memory_is_what_a_program_holds_at_once():
    sizes = {"argument": 100, "output": 90, "alias": 80, "temp": 7}
    analysis = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    assert grid_world_costs.memory_bytes(analysis) == 117


def cost(name, frames, ms):
    made = {"device": "NVIDIA H100", "versions": {"jax": "0.10.2"}, "commit": "abcdef0123"}
    values = {"update_ms": ms, "update_mb": 10.0, "step_us": 5.0, "state_kb": 1.5}
    return {"backbone": name, "frames": frames, "tokens": 26 * frames, **values, "made": made}


def test_the_table_of_costs_has_the_growth():
    rows = [cost("gru", 8, 10.0), cost("gru", 64, 85.0), cost("mamba", 8, 1000.0)]
    lines = grid_world_report.costs_table({"costs": {"settings": {"batch": 4}, "rows": rows}}).splitlines()
    assert lines[0].startswith("| backbone | update, ms | times | memory, MB | times |")
    assert lines[2].startswith("| `gru` | 10.0 / 85.0 | 8.5 | 10.0 / 10.0 | 1.0 |")
    assert lines[3].startswith("| `mamba` | 1,000 / - |  | 10.0 / - |  |")
    assert lines[5] == (
        "208 / 1,664 tokens, 4 sequences. There are 8 times as many tokens: 8 is linear, 64 quadratic. "
        "Made on NVIDIA H100, jax 0.10.2, at `abcdef0`."
    )


def test_the_table_of_errors_has_chance_and_what_is_possible():
    row = cost("gru", 3, 1.0) | {"parameters": 12345, "frames_by_gap": [[30, 20, 10], [30, 20, 10]]}
    row |= {"colour": [[24, 0, 6], [24, 4, 6]], "cell": [[30, 20, 10]] * 2, "frame": [[30, 20, 10]] * 2}
    settings = {"colours": 4, "seeds": 2, "updates": 1000, "frames_per_update": 64, "learning_rate": 5e-3}
    lines = grid_world_report.errors_table({"errors": {"settings": settings, "rows": [row]}}).splitlines()
    assert lines[0].endswith("| colour | colour, shown before | never | gap 1 | gap 2 |")
    name, frames, parameters, *cells = lines[2].strip("| ").split(" | ")
    assert (name, frames, parameters) == ("`gru`", "3", "12,345")
    assert cells[:4] == ["100.0 ± 0.0", "100.0 ± 0.0", "53.3 ± 3.3", "26.7 ± 6.7"]
    assert cells[4:] == ["80.0 ± 0.0", "10.0 ± 10.0", "60.0 ± 0.0"]
    # A new cell's colour is one of four; half of these frames show one.
    assert lines[3] == "| best possible | 3 |  | 37.5 | 37.5 | 37.5 | 0 | 75 | 0 | 0 |"
    assert lines[4] == "| chance |  |  | 100 | 100 | 75 | 75 | 75 | 75 | 75 |"


SMALL = "--backbones gru --frames 3 --frames-per-update 6 --updates 20 --test-batches 4 --cost-batch 2 --repeats 2"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where a study of one layer has run to its end: the errors first, the costs by a second command."""
    path = tmp_path_factory.mktemp("study")
    gru = dataclasses.replace(preset("tiny", "gru").agent.world_model.backbone, num_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            grid_world, "study_config", lambda options, name, frames, batch: model.StudyConfig(gru, frames, batch)
        )
        for part in ("errors", "costs"):
            assert grid_world.main([*SMALL.split(), "--seeds", "2", "--only", part, "--out", str(path)]) == 0
    return path


def test_a_whole_study_leaves_data_tables_and_picture(out):
    data = json.loads((out / "grid_world.json").read_text())
    (errors,), (costs,) = data["errors"]["rows"], data["costs"]["rows"]
    assert (errors["backbone"], errors["frames"], errors["tokens"]) == ("gru", 3, 78)
    # 4 batches of 2 sequences, of which each has 2 frames to predict.
    assert [sum(seed) for seed in errors["frames_by_gap"]] == [16, 16]
    first, last = np.array(errors["losses"])[:, 0], np.array(errors["losses"])[:, -1]
    assert first.shape == (2,) and (last < 0.5 * first).all() and first[0] != first[1]
    assert costs["update_ms"] > 0 and costs["update_mb"] > 1 and costs["compile_s"] > 0
    assert costs["state_kb"] == pytest.approx(62 * 4 / 1e3)  # one layer of 62 float32
    assert "jax" in costs["made"]["versions"] and costs["made"]["device"]
    assert "`gru`" in (out / "grid_world.md").read_text()
    assert (out / "grid_world.png").read_bytes().startswith(b"\x89PNG")


def test_tables_and_picture_can_be_made_again(out, tmp_path, capsys):
    (tmp_path / "grid_world.json").write_text((out / "grid_world.json").read_text())
    assert grid_world.main(["--only", "report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "grid_world.md").read_text() == (out / "grid_world.md").read_text()
    assert capsys.readouterr().out == (out / "grid_world.md").read_text()


def test_rows_of_other_settings_are_not_mixed(out, capsys):
    before = (out / "grid_world.json").read_text()
    assert grid_world.main([*SMALL.split(), "--seeds", "3", "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "has errors made with seeds 2, here 3; give that, or another --out" in line
    assert (out / "grid_world.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backbones lstm", "--backbones must be"),
        ("--frames 1", "--frames must be from 2 to --frames-per-update 64, one or more, got 1"),
        ("--frames 65", "--frames must be from 2 to --frames-per-update 64, one or more, got 65"),
        ("--width 100", "--width must be one of 64, 512, got 100"),
        ("--seeds 0", "--seeds must be from 1 to"),
        ("--learning-rate nan", "--learning-rate must be positive, got nan"),
        ("--only report", "there is nothing to report yet; leave --only report out"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, message):
    assert grid_world.main([*flags.split(), "--out", str(tmp_path / "new")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "new").exists()


def test_a_file_of_something_else_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "grid_world.json").write_text('{"study": "moon"}')
    assert grid_world.main(["--out", str(tmp_path)]) == 2
    assert "is not of this study; name another --out" in capsys.readouterr().err
