"""The sizes that `--backbone` chooses have as many parameters as Mamba-2, and the README shows them."""

from __future__ import annotations

import pathlib
import typing

import pytest

from drama_jax.config import BackboneName, ConfigError, preset, with_backbone
from experiments import parameters

README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("name", ["tiny", "xs"])
@pytest.mark.parametrize("backbone", typing.get_args(BackboneName))
def test_parameters_match_within_five_per_cent(name, backbone):
    for actions in (4, 18):
        ratio = parameters.count(name, backbone, actions) / parameters.count(name, "mamba2", actions)
        assert abs(ratio - 1) < 0.05, (actions, ratio)


def test_reference_has_the_released_transformer():
    assert parameters.count("reference", "transformer", 18) == 5_065_728
    agent = preset("reference", "transformer").agent
    assert agent.fidelity.reward_follows_action and not agent.fidelity.reset_at_episode_start
    assert agent.world_model.backbone.max_length == 128 == agent.world_model.batch_length


def test_the_readme_has_the_table(capsys):
    assert parameters.main([]) == 0
    assert capsys.readouterr().out in README.read_text(encoding="utf-8")


def test_no_action_is_one_clear_line(capsys):
    assert parameters.main(["--actions", "0"]) == 2
    assert capsys.readouterr().err == "error: --actions must be positive, got 0\n"


def test_sizes_are_those_of_a_preset():
    config = preset("xs", "gru")
    with pytest.raises(
        ConfigError, match="no size of 'rwkv' is known for a 'gru' of width 512; accepted: a 'mamba2' of"
    ):
        with_backbone(config, "rwkv")
    assert with_backbone(config, "gru") is config
