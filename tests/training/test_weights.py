"""Weights in one file."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from drama_jax.config import ConfigError, preset
from drama_jax.training import checkpoint, programs, weights


@pytest.fixture(scope="module")
def states():
    """Two agents of one configuration and different seeds."""
    config = preset("tiny").agent
    return [programs.initial_state(jax.random.key(seed), config, 4) for seed in (0, 1)]


def test_a_file_makes_another_agent_the_same(states, tmp_path):
    file = tmp_path / "weights.npz"
    weights.write(file, weights.of(states[0]))
    loaded = weights.into(states[1], checkpoint.load_weights(file))
    for part in ("params", "batch_stats"):
        chex.assert_trees_all_equal(getattr(loaded.world_model, part), getattr(states[0].world_model, part))
    chex.assert_trees_all_equal(loaded.behaviour.params, states[0].behaviour.params)
    chex.assert_trees_all_equal(loaded.behaviour.normaliser, states[0].behaviour.normaliser)
    # Only the weights: what training keeps is still the other agent's.
    chex.assert_trees_all_equal(loaded.behaviour.slow_critic, states[1].behaviour.slow_critic)


def test_weights_of_another_configuration_are_refused(states):
    other = weights.of(programs.initial_state(jax.random.key(0), preset("tiny").agent, 6))
    with pytest.raises(ConfigError, match="this configuration needs"):
        weights.into(states[0], other)
    incomplete = weights.of(states[0])
    del incomplete["world_model"]["params"]["decoder"]
    with pytest.raises(ConfigError, match="has no array world_model/params/decoder"):
        weights.into(states[0], incomplete)


def test_files_that_are_none_are_one_line(states, tmp_path):
    with pytest.raises(ConfigError, match=r"named \*\.npz"):
        weights.write(tmp_path / "weights.pt", weights.of(states[0]))
    with pytest.raises(ConfigError, match="cannot be written"):
        weights.write(tmp_path / "nowhere" / "weights.npz", weights.of(states[0]))
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "pickled.npz", world_model=np.array([{"a": 1}], dtype=object))
    for name, message in (("text", "holds no weights"), ("pickled", "holds no weights"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            weights.read(tmp_path / f"{name}.npz")
