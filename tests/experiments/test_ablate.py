"""`experiments.ablate`: what is varied, one whole ablation at the smallest size, and what it says of mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import test_jax_command

from drama_jax.config import preset
from drama_jax.training import programs
from experiments import ablate, ablation_report, ablation_runs

# Environment, agent and steps of another test, so that both are one compilation.
MICRO = " ".join(test_jax_command.ARGUMENTS[test_jax_command.ARGUMENTS.index("--compilation-cache") :])
AGENT = preset("xs").agent


def result(**fields):
    """A result of two seeds."""
    values = {
        "name": "module:Catch",
        "variant": "DFS",
        "steps": 100,
        "final_returns": [1.0, 0.5],
        "curve_steps": [50.0, 100.0],
        "curves": [[0.0, 1.0], [None, 0.5]],
        "ms_per_step": 12.34,
        "parameters": 12345,
        "reconstruction": 1.5,
        "object_errors": [],
        "device": "cpu",
        "commit": None,
    }
    return ablation_runs.Result(**(values | fields))


def test_the_sampler_varies_its_kind_and_temperature():
    found = ablate.variants("sampler", AGENT, atari=False)
    assert list(found) == ["DFS", "DFS, 4 tau", "uniform"]
    assert found["DFS, 4 tau"] == ["--agent.replay.tau", "40.0", "--agent.replay.imagination-tau", "40.0"]
    assert found["uniform"] == ["--agent.replay.sampler", "uniform"]


@pytest.mark.parametrize(("size", "steps"), [(16, 16 * 64), (1, 128)])
def test_sequences_of_any_length_make_batches_of_as_many_steps(size, steps):
    model = dataclasses.replace(AGENT.world_model, batch_size=size, batch_length=64)
    agent = dataclasses.replace(AGENT, world_model=model)
    for flags in ablate.variants("sequence-length", agent, atari=False).values():
        assert int(flags[1]) * int(flags[3]) == steps


def test_channels_are_halved_and_doubled():
    half, same, double = (flags[1:] for flags in ablate.variants("autoencoder", AGENT, atari=False).values())
    depths = AGENT.world_model.autoencoder.depths
    assert same == []
    assert half == [str(depth // 2) for depth in depths] and double == [str(2 * depth) for depth in depths]


def test_backbones_are_of_one_size_in_atari():
    flags = ablate.variants("backbone", AGENT, atari=True)
    assert flags["rwkv"] == ["--backbone", "rwkv"] and len(flags) == 5


def test_backbones_are_of_one_size_where_sizes_are_known():
    options = ablate.Options(what="backbone", envs=("Catch-bsuite",))
    plans = ablate.plans_of(options, "Catch-bsuite")
    assert all(plan.memory for plan in plans) and len(plans) == 5
    numbers = {}
    for plan in plans:
        _, config, env = ablation_runs.jax_options.parse(plan.arguments)
        assert config.agent.world_model.backbone.name == plan.variant
        shapes = programs.shapes(config.agent, env.num_actions)
        numbers[plan.variant] = sum(leaf.size for leaf in jax.tree.leaves(shapes.world_model.params))
    assert max(numbers.values()) < 1.05 * numbers["mamba2"] and min(numbers.values()) > 0.95 * numbers["mamba2"]
    other = dataclasses.replace(AGENT.world_model.backbone, width=128)
    wider = dataclasses.replace(AGENT, world_model=dataclasses.replace(AGENT.world_model, backbone=other))
    prefix = "--agent.world-model.backbone"
    assert ablate.variants("backbone", wider, atari=False)["rwkv"] == [f"{prefix}.name", "rwkv"]


def test_runs_of_the_preset_as_it_is_are_shared():
    parts: tuple[ablate.What, ...] = ("sampler", "backbone", "autoencoder")
    plans = [plan for what in parts for plan in ablate.plans_of(ablate.Options(what=what), "Catch-bsuite")]
    shared = {plan.variant: plan.arguments for plan in plans if "ablations/runs/preset" in plan.arguments}
    assert list(shared) == ["DFS", "mamba2", "channels of the preset"] and len(set(shared.values())) == 1


def test_the_sampler_is_tried_on_three_rewards():
    options = ablate.Options(what="sampler", steps=30)
    plans = [plan for name in ablate.names(options) for plan in ablate.plans_of(options, name)]
    assert len(plans) == 9 and {plan.name.rpartition(":")[2] for plan in plans} == {
        "Catch-bsuite",
        "SparseCatch",
        "SwitchingCatch",
    }
    for plan in plans:
        ablation_runs.check(plan)
    assert plans[2].arguments[-4:] == ("--steps", "30", "--agent.replay.sampler", "uniform")


def test_table_and_interval():
    lines = ablation_report.table(
        "sampler", [result(), result(variant="uniform", final_returns=[None, None])]
    ).splitlines()
    assert lines[2] == "| Catch | DFS | 0.75 | 0.50 to 1.00 | 12.3 | 12,345 | 1.5 |"
    assert lines[3].startswith("| Catch | uniform |  |  |")
    assert ablation_report.interval([1.0]) == ""
    lines = ablation_report.table("backbone", [result(memory_bytes=12_345_678), result(variant="gru")]).splitlines()
    assert lines[0].endswith("| reconstruction loss | memory, MB |")
    assert lines[2].endswith("| 1.5 | 12.3 |") and lines[3].endswith("| 1.5 |  |")


def test_returns_by_stretch_are_means_over_seeds_of_each_eighth_of_the_steps():
    # Three seeds of 16 points: of two points in each eighth, the first seed lacks one, and the third both of the last.
    curves = [[2.0 * point for point in range(16)] for _ in range(3)]
    curves[0][1] = None
    curves[2][14:] = [None, None]
    curves[1] = [value + 1 for value in curves[1]]
    cells = ablation_report.by_stretch(result(steps=1600, curves=curves))
    # Means of the seeds: 0, 2, 1 in the first eighth, 5, 6, 5 in the second, 29, 30 in the last.
    assert cells[0] == "1.00 ± 0.58" and cells[1] == "5.33 ± 0.33" and cells[-1] == "29.50 ± 0.50"
    lines = ablation_report.stretches("sampler", [result(steps=1600, curves=curves)]).splitlines()
    assert lines[2].startswith("| Catch, sampler | to 200 | to 400 |")
    assert lines[4].startswith("| DFS | 1.00 ± 0.58 | 5.33 ± 0.33 |")
    assert ablation_report.by_stretch(result(curves=[[None] * 8])) == [""] * 8


@pytest.fixture(scope="module")
def out_and_errors(tmp_path_factory):
    """Where an ablation with one variant has run to its end, and what it says when other settings are asked for."""
    path = tmp_path_factory.mktemp("ablation")
    wanted = ["--what", "autoencoder", "--envs", test_jax_command.NAME, "--seeds", "2"]
    arguments = [*wanted, "--steps", str(test_jax_command.STEPS), "--out", str(path), f"--flags={MICRO}"]
    with pytest.MonkeyPatch.context() as patch:
        small = {"small": ["--agent.world-model.autoencoder.depths", "2", "4"]}
        patch.setattr(ablate, "variants", lambda *_, **__: small)
        assert ablate.main(arguments) == 0
        patch.setattr(ablation_runs.jax_env, "train", lambda *_: pytest.fail("finished runs are not run again"))
        assert ablate.main(arguments) == 0
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            assert ablate.main([*arguments[:-1], f"--flags={MICRO} --agent.replay.tau 3"]) == 2
    return path, errors.getvalue()


@pytest.fixture(scope="module")
def out(out_and_errors):
    """Where an ablation with one variant has run to its end."""
    return out_and_errors[0]


def test_finished_runs_of_other_settings_are_not_taken(out_and_errors):
    message = out_and_errors[1].strip()
    assert message.startswith("error: --agent.replay.tau: the run in ") and message.endswith("; name another --out")


def test_a_whole_ablation_leaves_data_table_and_picture(out):
    (data,) = json.loads((out / "autoencoder.json").read_text())["runs"]
    assert (data["steps"], len(data["final_returns"]), len(data["curves"])) == (24, 2, 2)
    assert data["parameters"] > 1000 and np.isfinite(data["reconstruction"])
    # An untrained autoencoder is grey everywhere.
    for objects, elsewhere in data["object_errors"]:
        assert 0.1 < objects < 0.5 and 0.1 < elsewhere < 0.5
    assert "| small |" in (out / "autoencoder.md").read_text()
    assert (out / "autoencoder.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.glob("runs/small/Short/tiny/seed*"))) == 2


def test_memory_is_that_of_the_update_with_its_state(out):
    _, config, env = ablation_runs.jax_options.parse(["--env", test_jax_command.NAME, *MICRO.split()])
    shapes = programs.shapes(config.agent, env.num_actions)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dataclasses.replace(shapes, key=None)))
    (directory, *_) = sorted(out.glob("runs/small/Short/tiny/seed*"))
    found = ablation_runs.update_memory(config.agent, ablation_runs.checkpoint.load_weights(directory))
    assert found is not None and state < found < 50 * state


def test_tables_and_picture_are_made_anew_from_the_data_alone(out, tmp_path, capsys):
    (tmp_path / "autoencoder.json").write_bytes((out / "autoencoder.json").read_bytes())
    assert ablate.main(["--what", "autoencoder", "--redraw", "--out", str(tmp_path)]) == 0
    for name in ("autoencoder.md", "autoencoder.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert capsys.readouterr().out == (out / "autoencoder.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--what taste", "--what"),
        ("--what sampler --seeds 0", "--seeds must be at least 1, got 0"),
        ("--what sampler --envs Katch", "gymnax has no environment 'Katch'"),
        ("--what autoencoder --envs CartPole-v1", "--envs CartPole-v1: it shows vectors, and no objects"),
        ("--what sampler --envs Catch-bsuite --game Pong", "--game and --envs exclude each other"),
        ("--what sampler --game Pong --preset medium", "unknown preset 'medium'"),
        ("--what sampler --flags=--agent.tau=3", "--agent.tau"),
        ("--what sampler --redraw", "run the ablation without --redraw"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, message):
    assert ablate.main([*flags.split(), "--out", str(tmp_path / "new")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "new").exists()
