"""The Atari100k entry point: a run from end to end at a very small size, and mistakes that leave nothing behind."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "faults"))
from micro import ARGUMENTS

from drama_jax.config import AgentConfig, ConfigError, preset
from drama_jax.training import checkpoint, programs
from experiments import atari100k, atari_options, machine, memory
from tests.tools import metrics_lines

# The agent of tests/faults, which is compiled once for both.
VERY_SMALL = [*ARGUMENTS[2:], *"""
--steps 40 --eval-episodes 3 --evaluation.max-episode-steps 12 --atari.max-episode-steps 15
--logging.metrics-every 10 --logging.images-every 30 --logging.checkpoint-every 30
--logging.progress --logging.tensorboard
""".split()]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[pathlib.Path, str, int]:
    """One very small run of Breakout: its directory, what it printed, and how often the update was traced."""
    logdir = tmp_path_factory.mktemp("runs")
    programs.update.clear_cache()  # of runs of the same agent
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        code = atari100k.main(["--game", "breakout", "--logdir", str(logdir), "--seed", "5", *VERY_SMALL])
    assert code == 0
    (directory,) = (logdir / "Breakout" / "tiny").iterdir()
    return directory, "\n".join(printed), programs.update._cache_size()


def test_the_update_is_traced_once_per_run(finished):
    assert finished[2] == 1


def test_the_run_directory_is_complete(finished):
    directory = finished[0]
    assert directory.name.startswith("seed5-")
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "images", "checkpoints", "replay", "scores.json", "lock"
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())["config"]
    assert config["steps"] == 40 and config["agent"]["imagination"]["horizon"] == 4
    assert {path.name for path in (directory / "images").iterdir()} == {
        f"world_model-{kind}-{step}.png"
        for kind in ("reconstruction", "imagined_rollout")
        for step in ("0000030", "0000040")
    }


def test_the_metrics_show_the_signs_of_failure(finished):
    lines = metrics_lines(finished[0])
    last = [line for line in lines if "replay/size" in line][-1]
    assert last["step"] == 40 and last["replay/size"] == 25  # its capacity
    for tag in (
        "world_model/reconstruction_loss", "world_model/reward_loss", "world_model/termination_loss",
        "world_model/dynamics_loss", "world_model/dynamics_kl", "world_model/representation_loss",
        "world_model/representation_kl", "world_model/total_loss", "world_model/grad_norm",
        "actor_critic/policy_loss", "actor_critic/value_loss", "actor_critic/entropy", "actor_critic/return_scale",
        "actor_critic/total_loss", "actor_critic/grad_norm", "actor_critic/imagined_reward",
        "actor_critic/imagined_value", "actor_critic/imagined_termination", "actor_critic/advantage",
        "dfs/trained_q10", "dfs/trained_q50", "dfs/trained_q90", "dfs/trained_max",
        "dfs/imagined_q10", "dfs/imagined_q50", "dfs/imagined_q90", "dfs/imagined_max", "charts/SPS",
    ):  # fmt: skip
        assert np.isfinite(last[tag]), tag
    events = EventAccumulator(str(finished[0] / "tensorboard")).Reload()
    assert set(last) - {"step", "seconds"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"world_model/reconstruction", "world_model/imagined_rollout"}
    assert "eval/episodic_return" in events.Tags()["scalars"]


def test_every_line_of_metrics_has_step_and_seconds(finished):
    lines = metrics_lines(finished[0])
    for name in ("step", "seconds"):
        assert [line[name] for line in lines] == sorted(line[name] for line in lines)
    assert "eval/episodic_return" in lines[-1]
    assert lines[0]["seconds"] > 0
    assert lines[-1]["seconds"] == round(json.loads((finished[0] / "scores.json").read_text())["training_s"], 3)


def test_the_scores_are_written_and_printed(finished):
    directory, printed, _ = finished
    result = json.loads((directory / "scores.json").read_text())
    assert len(result["evaluation_returns"]) == 3
    assert result["mean"] == np.mean(result["evaluation_returns"])
    assert result["human_normalised"] == pytest.approx((result["mean"] - 1.7) / (30.5 - 1.7))
    # Episodes of at most 15 steps: the auto-reset rows are no steps.
    assert [step for step, _ in result["training_returns"]] == [15, 30]
    assert (result["game"], result["preset"], result["seed"], result["steps"]) == ("Breakout", "tiny", 5, 40)
    assert result["ms_per_step"] > 0 and result["wall_clock_s"] > 0 and result["versions"]["jax"] == jax.__version__
    assert "this run" in printed and "human-normalised" in printed


def test_the_checkpoint_holds_the_trained_agent(finished):
    checkpoints = finished[0] / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["30", "40"]
    weights = checkpoint.load_weights(checkpoints)
    assert {name: set(part) for name, part in weights.items()} == {
        "world_model": {"params", "batch_stats"},
        "behaviour": {"params", "normaliser"},
    }
    _, config = atari_options.parse(["--game", "Breakout", *VERY_SMALL], "x")
    expected = programs.shapes(config.agent, 4)
    for name in weights:
        assert jax.tree.map(np.shape, weights[name]["params"]) == jax.tree.map(np.shape, getattr(expected, name).params)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--game", "Brekout"], "--game: unknown game 'Brekout': did you mean Breakout"),
        (["--game", "Pong", "--preset", "huge"], "--preset: unknown preset 'huge'"),
        (["--game", "Pong", "--env-backend", "gym"], "--env-backend"),
        (["--game", "Pong", "--steps", "-1"], "--steps must be >= 0"),
        (["--game", "Pong", "--agent.replay.capacity", "50"], "--agent.replay.capacity"),
        (["--game", "Pong", "--seed", "2147483647"], "--seed must lie in [0, 2000000000]"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert (
        atari100k.main([*arguments, "--compilation-cache", "None"] if "--preset" not in arguments else arguments) == 2
    )
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert expected in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_emulator_names_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert atari100k.main(["--game", "Pong", "--logdir", str(tmp_path / "runs"), "--compilation-cache", "None"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --env-backend envpool: EnvPool is not installed") and error.count("\n") == 1
    assert "--env-backend ale" in error
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_log_directory_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert atari100k.main(["--game", "Pong", "--logdir", str(tmp_path / "file" / "runs")]) == 2
    assert "error: --logdir" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert atari100k.main(["--game", "Pong", "--logdir", str(tmp_path / "runs")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_too_small_for_the_replay_says_the_bytes():
    config = AgentConfig()
    ring = config.replay.capacity * (64 * 64 * 3 + 18) + 8
    needed = sum(memory.memory_needed(config).values())
    with pytest.raises(
        ConfigError, match=rf"--agent.replay.capacity 100000: needs {ring:,} of {needed:,} bytes .* 999 are free"
    ):
        memory.check_memory(config, {"bytes_limit": 1_000, "bytes_in_use": 1})
    memory.check_memory(config, {"bytes_limit": needed})
    memory.check_memory(config, None)


@pytest.mark.parametrize(
    ("preset_name", "seconds", "left", "expected"),
    [("xs", 12.0, 98_000, "13.6 days"), ("s", 0.5, 20_000, "2.8 hours"), ("reference", 0.1, 1_000, "1.7 minutes")],
)
def test_a_long_run_without_a_gpu_says_how_long_it_takes(preset_name, seconds, left, expected):
    notice = machine.slow_device_notice(preset_name, seconds, left)
    assert notice is not None and expected in notice and "--preset tiny" in notice


def test_a_tiny_run_says_nothing():
    assert machine.slow_device_notice("tiny", 10.0, 10_000) is None


def test_no_compilation_cache_is_kept_where_none_is_asked_for(monkeypatch):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *arguments: updates.append(arguments))
    for directory in (None, pathlib.Path("none"), pathlib.Path("None")):
        machine.keep_compiled_programs(directory)
    assert updates == []
    machine.keep_compiled_programs(pathlib.Path("/tmp/cache"))
    assert updates == [("jax_compilation_cache_dir", "/tmp/cache")]


@pytest.mark.parametrize(
    ("agents", "at_most", "used"), [(4, None, 4), (5, None, 1), (6, None, 3), (3, 2, 1), (4, 2, 2)]
)
def test_agents_are_shared_out_to_as_many_devices_as_can_have_as_many(monkeypatch, agents, at_most, used):
    monkeypatch.setattr(jax, "local_devices", lambda: list("abcd"))
    assert machine.share_out(agents, at_most) == list("abcd")[:used]


def test_the_evaluation_has_its_own_step_limit(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "make_atari", lambda game, atari, **rest: seen.append((atari.max_episode_steps, rest)))
    config = preset("xs")
    machine.make_environment("Pong", config, num_envs=3, evaluation=True)
    assert seen == [(27_000, {"num_envs": 3, "image_size": 64, "seed": 1})]
