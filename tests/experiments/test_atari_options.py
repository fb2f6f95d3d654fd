"""Flags, presets, overrides, and one-line errors."""

from __future__ import annotations

import pathlib
import shlex

import pytest

from drama_jax.config import PRESETS, ConfigError, preset
from experiments import atari_options, command_line


def parse(text: str):
    return atari_options.parse(text.split(), "program")


@pytest.mark.parametrize("name", ["tiny", "xs", "s", "reference"])
def test_without_overrides_a_preset_is_what_config_says(name):
    options, config = parse(f"--game Pong --preset {name}")
    assert config == preset(name)
    assert (options.game, options.preset, options.logdir) == ("Pong", name, pathlib.Path("runs"))


def test_every_preset_is_offered():
    assert set(atari_options._PRESETS) == set(PRESETS)


def test_overrides_are_applied_over_the_preset_wherever_it_stands():
    _, config = parse("--game Pong --agent.replay.tau 20 --preset=tiny --atari.sticky-actions 0.25")
    assert config.agent.replay.tau == 20.0 and config.atari.sticky_actions == 0.25
    assert config.agent.world_model == preset("tiny").agent.world_model


def test_every_kind_of_field_can_be_overridden():
    _, config = parse(
        "--game Pong --steps 9 --seed 3 --agent.fidelity.no-reset-at-episode-start --logging.no-tensorboard "
        "--agent.world-model.autoencoder.depths 4 8 16 --agent.behaviour.lambda_ 0.9 --evaluation.num-envs 2 "
        "--agent.behaviour.optimizer.learning-rate 1e-3 --agent.world-model.compute-dtype float32"
    )
    assert (config.steps, config.seed, config.evaluation.num_envs) == (9, 3, 2)
    assert not config.agent.fidelity.reset_at_episode_start and not config.logging.tensorboard
    assert config.agent.world_model.autoencoder.depths == (4, 8, 16)
    assert config.agent.behaviour.lambda_ == 0.9 and config.agent.behaviour.optimizer.learning_rate == 1e-3
    assert config.agent.world_model.compute_dtype == "float32"


def test_plain_flags_reach_the_configuration():
    options, config = parse(
        "--game Pong --env-backend ale --eval-episodes 3 --sampler uniform --logdir /tmp/x --compilation-cache None"
    )
    assert config.atari.backend == "ale" and config.evaluation.episodes == 3
    assert config.agent.replay.sampler == "uniform"
    assert options.logdir == pathlib.Path("/tmp/x") and options.compilation_cache is None


@pytest.mark.parametrize("name", ["tiny", "xs", "s", "reference"])
def test_backbone_and_behaviour_decide_the_defaults_of_the_others(name):
    _, config = parse(f"--game Pong --backbone transformer --preset {name} --behaviour=ppo")
    assert config == preset(name, "transformer", "ppo") != preset(name)
    assert config.agent.behaviour.name == "ppo" and config.agent.world_model.backbone.name == "transformer"
    _, config = parse(f"--game Pong --preset {name} --backbone gru --agent.world-model.backbone.mixer-width 24")
    assert (config.agent.world_model.backbone.name, config.agent.world_model.backbone.mixer_width) == ("gru", 24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "--game is missing"),
        ("--game", "--game needs a value"),
        ("--game Pong --preset huge", "--preset: unknown preset 'huge'; accepted: tiny, xs, s, reference"),
        ("--game Pong --steps -5", "--steps must be >= 0, got -5"),
        ("--game Pong --steps many", "--steps"),
        ("--game Pong --max-skipped-updates 0", "--max-skipped-updates must be positive, got 0"),
        ("--game Pong --seed -1", "--seed must lie in"),
        ("--game Pong --env-backend gym", "--env-backend must be one of 'envpool', 'ale', got 'gym'"),
        (
            "--game Pong --backbone lstm",
            "--backbone: unknown backbone 'lstm'; accepted: mamba2, mamba, gru, transformer, ",
        ),
        ("--game Pong --behaviour sac", "--behaviour: unknown behaviour 'sac'; accepted: actor_critic, ppo"),
        (
            "--game Pong --backbone transformer --agent.imagination.horizon 200",
            "context_length + horizon must be at most backbone.max_length = 128 for a transformer, got 208",
        ),
        (
            "--game Pong --backbone rwkv --agent.world-model.backbone.head-dim 48",
            "--agent.world-model.backbone.head-dim must divide mixer_width = 256, got 48",
        ),
        ("--game Pong --sampler best", "--sampler must be one of 'dfs', 'uniform', got 'best'"),
        ("--game Pong --eval-episodes -1", "--eval-episodes must be >= 0, got -1"),
        ("--game Pong --agent.replay.tau -3", "--agent.replay.tau must be positive, got -3.0"),
        ("--game Pong --agent.replay.tau nan", "--agent.replay.tau must be a finite number, got nan"),
        ("--game Pong --agent.replay.tau x", "--agent.replay.tau"),
        ("--game Pong --agent.replay.tu 3", "--agent.replay.tu, 3; perhaps --agent.replay.tau"),
        ("--game Pong --agent.replay.capacity 100", "--agent.replay.capacity must hold the 1033 steps"),
        ("--game Pong --agent.world-model.batch-size 4000", "--agent.world-model: a batch of 4000 windows"),
        ("--game Pong --agent.imagination.batch-size 2000", "--agent.imagination: a batch of 2000 windows"),
        ("--game Pong --agent.world-model.optimizer.b1 2", "--agent.world-model.optimizer.b1 must lie in [0, 1)"),
        ("--game Pong --agent.behaviour.lambda_ 2", "--agent.behaviour.lambda_ must lie in [0, 1]"),
        ("--game Pong more", "more"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(text, expected, capsys):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value) and "│" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_the_short_help_fits_on_a_screen(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset tiny --help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 50
    for flag in (
        "--game",
        "--preset",
        "--steps",
        "--seed",
        "--logdir",
        "--env-backend",
        "--eval-episodes",
        "--sampler",
        "--backbone",
        "--behaviour",
    ):
        assert flag in shown
    assert f"(default: {preset('tiny').steps})" in shown


def test_the_long_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help-all")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--agent.replay.imagination-tau", "--agent.fidelity.weight-by-survival", "--atari.noop-max"):
        assert flag in shown


@pytest.mark.parametrize("logdir", ["--logdir old", "--logdir=old", ""])
@pytest.mark.parametrize("resume", ["--no-resume", "--no_resume", "--resume", ""])
def test_the_command_that_continues_a_run_names_it_and_takes_it(logdir, resume):
    words = f"--game Pong {resume} {logdir} --agent.replay.tau 3".split()
    command = command_line.to_continue(words, "program", pathlib.Path("a run"))
    assert shlex.split(command) == [*"program --game Pong --agent.replay.tau 3 --logdir".split(), "a run"]
