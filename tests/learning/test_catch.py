"""The whole agent learns: gymnax's Catch, environment and training in one jitted scan.

`CATCH_SEEDS=0,1,2 pytest tests/learning` runs other seeds than the one of CI.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from drama_jax.config import ConfigError
from drama_jax.envs import jax_env
from drama_jax.training import in_graph
from experiments.jax_presets import PRESETS

STEPS = 3200
SEEDS = [int(seed) for seed in os.environ.get("CATCH_SEEDS", "0").split(",")]
CONFIG = PRESETS["tiny"]().agent
pytestmark = pytest.mark.usefixtures("compiled_well")


@pytest.fixture(scope="module")
def env():
    """One object, so that all seeds share one compilation."""
    return jax_env.make("Catch-bsuite", image_size=10)


@pytest.mark.parametrize("seed", SEEDS)
def test_catch_is_learnt(seed, env):
    state, history, metrics = in_graph.run(CONFIG, env, jax.random.key(seed), steps=STEPS)
    lasts = np.asarray(history.lasts)
    returns = np.asarray(history.returns)[lasts]

    # Every episode is nine steps and ends with the one reward, stored with the last action.
    assert np.all(np.flatnonzero(lasts) % 9 == 8)
    assert set(returns) == {-1.0, 1.0} == set(np.asarray(history.rewards)[lasts])
    stored = state.replay
    np.testing.assert_array_equal(np.flatnonzero(stored.terminals) % 9, 8)
    np.testing.assert_array_equal(np.flatnonzero(stored.firsts) % 9, 0)
    np.testing.assert_array_equal(np.asarray(stored.rewards)[np.asarray(stored.terminals)], returns)

    assert all(bool(np.isfinite(value).all()) for value in jax.tree.leaves(metrics))
    assert metrics["world_model/total_loss"].shape == (STEPS - CONFIG.warmup_steps,)
    assert returns[:20].mean() < 0.3  # the random start: the test below must not be free
    assert returns[-100:].mean() >= 0.6


def test_frames_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match=r"frames of shape \(10, 10, 1\), but the environment shows \(20, 20, 1\)"):
        in_graph.run(CONFIG, jax_env.make("Catch-bsuite", image_size=20), jax.random.key(0), steps=1)


def test_make_names_what_is_missing():
    with pytest.raises(ConfigError, match="no environment 'Catch-me'"):
        jax_env.make("Catch-me", image_size=20)
