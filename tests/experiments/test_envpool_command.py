"""`experiments.envpool`: tasks of both kinds from end to end at a very small size, continuing, mistakes."""

from __future__ import annotations

import contextlib
import ctypes.util
import json

import numpy as np
import pytest

from drama_jax.config import ConfigError
from drama_jax.envs import envpool_backend
from drama_jax.training import checkpoint, config_file
from experiments import envpool, envpool_options, evaluate, machine
from tests.tools import metrics_but_for_the_clock

VERY_SMALL = """
--preset tiny --steps 24 --eval-episodes 2 --compilation-cache None --evaluation.num-envs 2
--agent.warmup-steps 16 --agent.acting-context 4 --agent.replay.capacity 30
--agent.world-model.batch-size 2 --agent.world-model.batch-length 6 --agent.world-model.backbone.num-layers 1
--agent.world-model.backbone.chunk-size 8 --agent.world-model.backbone.width 16
--agent.world-model.backbone.head-dim 8
--agent.imagination.batch-size 4 --agent.imagination.context-length 2 --agent.imagination.horizon 3
--agent.imagination.unroll 1
--agent.behaviour.actor-layers 1 --agent.behaviour.critic-layers 1 --agent.behaviour.actor-units 8
--agent.behaviour.critic-units 8
--logging.metrics-every 8 --logging.checkpoint-every 12 --logging.no-tensorboard --logging.no-progress
""".split()
CHEETAH = """
--task CheetahRun-v1 --task-rules.max-episode-steps 7 --agent.world-model.autoencoder.vector-units 8
--agent.world-model.autoencoder.vector-layers 1
""".split()
COINRUN = """
--task CoinrunEasy-v0 --agent.world-model.autoencoder.image-size 16 --agent.world-model.autoencoder.depths 2 4
""".split()
procgen = pytest.mark.skipif(
    ctypes.util.find_library("Qt5Gui") is None, reason="Procgen needs Qt 5 (Debian: libqt5gui5)"
)


def run(logdir, *words, code=0):
    """The command's run directory."""
    assert envpool.main([*VERY_SMALL, *words, "--logdir", str(logdir)]) == code
    (directory,) = logdir.glob("*/tiny/seed0-*")
    return directory


def saved(directory):
    """The last checkpoint's arrays, and the rows of the replay."""
    snapshot, segments = checkpoint.load(directory, config_file.read(directory)["id"])
    assert snapshot.step == 24
    files = [np.load(directory / segment.name) for segment in segments]
    return snapshot.device, {name: np.concatenate([file[name] for file in files]) for name in files[0].files}


@pytest.fixture(scope="module")
def cheetah(tmp_path_factory):
    """A finished run of DeepMind control's cheetah."""
    return run(tmp_path_factory.mktemp("runs"), *CHEETAH)


def test_a_task_of_deepmind_control_from_end_to_end(cheetah):
    assert cheetah.parts[-3:-1] == ("CheetahRun-v1", "tiny")
    scores = json.loads((cheetah / "scores.json").read_text())
    assert scores["game"] == "CheetahRun-v1" and scores["human_normalised"] is None
    assert len(scores["evaluation_returns"]) == 2 and np.isfinite(scores["mean"])
    assert [step for step, _ in scores["training_returns"]] == [7, 14, 21]
    assert not (cheetah / "images").exists()
    config = json.loads((cheetah / "config.json").read_text())["config"]
    assert config["agent"]["world_model"]["autoencoder"]["vector_size"] == 17
    lines = metrics_but_for_the_clock(cheetah)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in lines if "actor_critic/entropy" in line] == [24]


def test_what_is_stored_are_vectors_continuous_actions_and_ends_that_are_no_terminals(cheetah):
    _, rows = saved(cheetah)
    assert (rows["frames"].shape, rows["frames"].dtype) == ((24, 17), np.float32)
    assert (rows["actions"].shape, rows["actions"].dtype) == ((24, 6), np.float32)
    assert np.abs(rows["actions"]).max() <= 1 and len(np.unique(rows["actions"])) == 24 * 6
    assert not rows["terminals"].any()
    assert np.flatnonzero(rows["firsts"]).tolist() == [0, 7, 14, 21]


def test_a_run_that_was_stopped_continues_with_the_same_bits(cheetah, tmp_path, monkeypatch, capsys):
    asked = []

    @contextlib.contextmanager
    def after_the_eighteenth_step():
        yield lambda: asked.append(None) or len(asked) == 18

    with monkeypatch.context() as patch:
        patch.setattr(envpool, "stop_requested", after_the_eighteenth_step)
        directory = run(tmp_path, *CHEETAH)
    printed = capsys.readouterr().out
    assert "stopped; to continue:\npython -m experiments.envpool --preset tiny" in printed
    assert "--task CheetahRun-v1" in printed
    assert run(tmp_path, *CHEETAH) == directory
    assert "going on from step 18" in capsys.readouterr().out
    assert metrics_but_for_the_clock(directory) == metrics_but_for_the_clock(cheetah)
    (found, rows), (expected, expected_rows) = saved(directory), saved(cheetah)
    assert found.keys() == expected.keys() and rows.keys() == expected_rows.keys()
    for name, array in {**expected, **expected_rows}.items():
        np.testing.assert_array_equal({**found, **rows}[name], array, err_msg=name)


def test_a_finished_run_can_be_evaluated_again(cheetah, capsys):
    assert evaluate.main(["--logdir", str(cheetah), "--episodes", "2", "--num-envs", "2"]) == 0
    assert "CheetahRun-v1" in capsys.readouterr().out
    result = json.loads((cheetah / "evaluation-24.json").read_text())
    assert len(result["evaluation_returns"]) == 2 and result["env_backend"] == "envpool"
    assert evaluate.main(["--logdir", str(cheetah), "--env-backend", "ale"]) == 2
    assert "error: --env-backend ale: CheetahRun-v1 is played through envpool only" in capsys.readouterr().err


@procgen
def test_a_game_of_procgen_from_end_to_end(tmp_path):
    directory = run(tmp_path, *COINRUN, "--eval-episodes", "0")
    _, rows = saved(directory)
    assert (rows["frames"].shape, rows["frames"].dtype) == ((24, 16, 16, 3), np.uint8)
    assert (rows["actions"].shape, rows["actions"].dtype) == ((24,), np.int32)
    assert rows["actions"].max() < 15 and len(np.unique(rows["actions"])) > 5
    assert {path.name.rpartition("-")[0] for path in (directory / "images").iterdir()} == {
        "world_model-reconstruction", "world_model-imagined_rollout"
    }  # fmt: skip


AE = "--agent.world-model.autoencoder"
WRONG = [
    ("", "--task: name one, for example --task CheetahRun-v1"),
    ("--task CheetaRun-v1", "has no task 'CheetaRun-v1'; did you mean CheetahRun-v1"),
    ("--task Pong-v5", "--task: Pong-v5 is Atari: python -m experiments.atari100k --game Pong"),
    ("--task MiniGrid-Empty-5x5-v0", "--task: MiniGrid-Empty-5x5-v0 shows neither a colour picture nor numbers"),
    ("--task CheetahRun-v1 --preset s", "--preset: unknown preset 's'; accepted: tiny, xs"),
    ("--task CheetahRun-v1 --seeds 0", "--seeds must be an integer from 1 to 1024, got 0"),
    ("--task CheetahRun-v1 --seed -1", "--seed must lie in [0, 2000000000], got -1"),
    ("--task CheetahRun-v1 --steps -1", "--steps must be >= 0, got -1"),
    ("--task CheetahRun-v1 --max-skipped-updates 0", "--max-skipped-updates must be positive, got 0"),
    ("--task CheetahRun-v1 --task Cheetah", "has no task 'Cheetah'"),
    ("--task CheetahRun-v1 --task-rules.max-episode-steps -1", "--task-rules.max-episode-steps must be >= 0, got -1"),
    (f"--task CheetahRun-v1 {AE}.vector-size 3", f"{AE}.vector-size must be 17 for CheetahRun-v1, got 3"),
    ("--task CheetahRun-v1 --game Pong", "Unrecognized options: --game"),
    ("--task CheetahRun-v1 --logdir /dev/null/runs", "--logdir /dev/null/runs: /dev/null is a file; name a directory"),
    pytest.param("--task CoinrunEasy-v0 " + f"{AE}.image-channels 1", f"{AE}.image-channels must be 3", marks=procgen),
    pytest.param(
        "--task CoinrunEasy-v0 --task-rules.max-episode-steps 9",
        "--task-rules.max-episode-steps must be 1000 for CoinrunEasy-v0, which keeps to its own limit, got 9",
        marks=procgen,
    ),
    pytest.param(
        "--task CoinrunEasy-v0 --evaluation.max-episode-steps 9",
        "--evaluation.max-episode-steps must be 1000 for CoinrunEasy-v0, which keeps to its own limit, got 9",
        marks=procgen,
    ),
]


@pytest.mark.parametrize(("text", "line"), WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(text, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert envpool.main([*text.split(), "--compilation-cache", "None"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.splitlines(True) == [output.err]
    assert line in output.err
    assert list(tmp_path.iterdir()) == []


def test_without_envpool_a_line_says_how_to_get_it(monkeypatch, capsys):
    def missing():
        raise ConfigError("EnvPool is not installed: run ...")

    monkeypatch.setattr("drama_jax.envs.envpool_tasks.import_envpool", missing)
    assert envpool.main(["--task", "CheetahRun-v1"]) == 2
    assert capsys.readouterr().err == "error: --task: EnvPool is not installed: run ...\n"
    assert envpool_backend.import_envpool().list_all_envs()


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_needs_no_task(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        envpool_options.parse([flag])
    assert not stop.value.code
    output = capsys.readouterr().out
    assert "--task" in output and ("--agent.replay.alpha" in output) == (flag == "--help-all")


def test_presets_are_fitted_to_the_task():
    _, tiny = envpool_options.parse(["--task", "HalfCheetah-v4", "--preset", "tiny", "--backbone", "gru"])
    options, xs = envpool_options.parse(["--task", "WalkerWalk-v1", "--seeds", "2", "--sampler", "uniform"])
    assert tiny.agent.world_model.autoencoder.vector_size == 17 and tiny.agent.world_model.backbone.name == "gru"
    assert xs.agent.world_model.autoencoder.vector_size == 24 and xs.agent.world_model.backbone.width == 512
    assert xs.agent.replay.sampler == "uniform" and (xs.seed, options.seeds, options.game) == (0, 2, "WalkerWalk-v1")
    assert xs.evaluation.max_episode_steps == 27_000


def test_a_failing_emulator_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    make = machine.make_environment

    def failing(*arguments, **options):
        environment = make(*arguments, **options)
        monkeypatch.setattr(environment, "step", lambda actions: environment._vector(np.full((1, 17), np.nan)))
        return environment

    monkeypatch.setattr(machine, "make_environment", failing)
    run(tmp_path, *CHEETAH, code=1)
    error = capsys.readouterr().err
    assert "the emulator failed in step 0: RuntimeError: an observation is not finite" in error
