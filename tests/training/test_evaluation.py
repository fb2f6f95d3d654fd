"""Evaluation against a scripted environment."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from fakes import AGENT, NUM_ACTIONS, ScriptedEnv, init

from drama_jax.training import evaluation


@pytest.mark.parametrize(
    ("episodes", "num_envs", "expected"), [(10, 5, [2] * 5), (7, 3, [3, 2, 2]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0])]
)
def test_episodes_are_dealt_out_evenly(episodes, num_envs, expected):
    assert evaluation.episodes_per_environment(episodes, num_envs) == expected


def test_every_environment_plays_its_number_of_whole_episodes(monkeypatch):
    monkeypatch.setattr(evaluation, "agent", AGENT)
    env = ScriptedEnv([2, 7, 3])
    seen: list[float] = []
    returns = evaluation.evaluate(init(), env, 7, jax.random.key(0), on_episode=seen.append)
    # Taking the first seven episodes to end would give env 0 four of them.
    assert returns == [102.0] * 3 + [107.0] * 2 + [103.0] * 2
    assert sorted(seen) == sorted(returns)


def test_it_acts_greedily_in_the_current_frame(monkeypatch):
    monkeypatch.setattr(evaluation, "agent", AGENT)
    env = ScriptedEnv([6])
    evaluation.evaluate(init(), env, 2, jax.random.key(0))
    actions = [row["action"] for row in env.rows]
    assert actions == [(row["frame"] - 1) % (NUM_ACTIONS - 1) for row in env.rows]


def test_no_episodes_play_nothing(monkeypatch):
    monkeypatch.setattr(evaluation, "agent", AGENT)
    env = ScriptedEnv([3])
    assert evaluation.evaluate(init(), env, 0, jax.random.key(0)) == []
    assert env.events == []


def test_the_state_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(evaluation, "agent", AGENT)
    state = init()
    before = jax.device_get(state)
    evaluation.evaluate(state, ScriptedEnv([3]), 2, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_it_can_be_stopped(monkeypatch):
    monkeypatch.setattr(evaluation, "agent", AGENT)
    env, asked = ScriptedEnv([3]), iter(range(1, 100))
    assert evaluation.evaluate(init(), env, 2, jax.random.key(0), stop=lambda: next(asked) == 3) is None
    assert env.events == ["step", "step"]
