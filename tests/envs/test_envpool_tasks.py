"""EnvPool beyond Atari: what is seen and done, where episodes end, saved states, bad input."""

from __future__ import annotations

import ctypes.util

import envpool
import numpy as np
import pytest

from drama_jax.action_space import Continuous
from drama_jax.config import ConfigError, TaskConfig
from drama_jax.envs import envpool_tasks
from drama_jax.envs.base import StateMismatch
from drama_jax.envs.envpool_tasks import describe, make_task

procgen = pytest.mark.skipif(
    ctypes.util.find_library("Qt5Gui") is None, reason="Procgen needs Qt 5 (Debian: libqt5gui5)"
)


def make(name, *, num_envs=2, image_size=64, seed=0, **rules):
    return make_task(name, TaskConfig(**rules), num_envs=num_envs, image_size=image_size, seed=seed, num_threads=1)


def pool(name, **options):
    """EnvPool's own."""
    return envpool.make(name, env_type="gymnasium", num_envs=2, batch_size=2, num_threads=1, seed=0, **options)


@pytest.mark.parametrize(
    ("name", "shape", "actions", "limit"),
    [
        ("CheetahRun-v1", (17,), Continuous(6), 1000),
        ("FingerSpin-v1", (12,), Continuous(2), 1000),  # with a number that is no array
        ("ManipulatorBringBall-v1", (44,), Continuous(5), 1000),  # with a matrix
        ("HalfCheetah-v4", (17,), Continuous(6), 1000),
        ("CartPole-v1", (4,), 2, 500),
        ("FrozenLake-v1", (16,), 4, 100),
        ("CarRacing-v3", (96, 96, 3), Continuous(3), 1000),
        pytest.param("CoinrunEasy-v0", (64, 64, 3), 15, 1000, marks=procgen),
        pytest.param("BigfishHard-v0", (64, 64, 3), 15, 6000, marks=procgen),
    ],
)
def test_spaces_are_read(name, shape, actions, limit):
    task = describe(name)
    assert (task.shape, task.num_actions, task.max_episode_steps) == (shape, actions, limit)
    assert task.limit_is_fixed == (name in ("CoinrunEasy-v0", "BigfishHard-v0"))


def test_a_vector_is_all_named_arrays_in_order_and_actions_are_scaled():
    env, theirs = make("QuadrupedEscape-v1"), pool("QuadrupedEscape-v1")
    env.reset()
    theirs.reset()
    rng = np.random.default_rng(0)
    low, high = theirs.action_space.low, theirs.action_space.high
    assert sorted(set(high.round(6))) == [0.8, 1.0, 1.1]
    for _ in range(3):
        actions = rng.uniform(-1, 1, (2, 12)).astype(np.float32)
        ours = env.step(actions)
        seen, reward, *_ = theirs.step(np.float64(low) + (actions.astype(np.float64) + 1) / 2 * (high - low))
        expected = np.concatenate([seen[key].reshape(2, -1) for key in theirs.observation_space.spaces], axis=1)
        assert ours.frames.dtype == np.float32 and ours.frames.shape == (2, *env.frame_shape) == (2, 113)
        np.testing.assert_allclose(ours.frames, expected, rtol=1e-6, atol=1e-12)
        np.testing.assert_array_equal(ours.rewards, reward)
    for extreme, bound in ((-1, low), (1, high)):
        np.testing.assert_allclose(env._theirs(np.full((2, 12), extreme, np.float32)), np.stack([bound, bound]))


def test_the_step_limit_truncates_and_the_row_after_it_starts_an_episode_without_a_reward():
    env = make("CartpoleBalance-v1", max_episode_steps=3)
    rows = [env.reset()] + [env.step(np.full((2, 1), 0.1, np.float32)) for _ in range(9)]
    for name, expected in {
        "first": [1, 0, 0, 0, 1, 0, 0, 0, 1, 0],
        "last": [0, 0, 0, 1, 0, 0, 0, 1, 0, 0],
        "truncated": [0, 0, 0, 1, 0, 0, 0, 1, 0, 0],
        "terminals": [0] * 10,
    }.items():
        np.testing.assert_array_equal([getattr(row, name) for row in rows], np.transpose([expected] * 2), err_msg=name)
    rewards = np.array([row.rewards for row in rows])
    assert rewards.dtype == np.float32 and ((rewards > 0).all(axis=1) == [not row.first[0] for row in rows]).all()
    assert not rewards[[0, 4, 8]].any()
    assert np.abs(rows[4].frames - rows[3].frames).max() > 1e-3  # another place


def test_an_episode_that_ends_by_itself_is_a_terminal():
    env = make("CartPole-v1")
    assert env.num_actions == 2
    ends = {0: [], 1: []}
    observation = env.reset()
    for step in range(60):
        before, observation = observation, env.step(np.array([1, 0]))
        assert (observation.first == before.last).all() and not observation.truncated.any()
        assert (observation.terminals == observation.last).all()
        assert (observation.rewards == ~observation.first).all()  # 1 a step, the last one's included
        for index in np.flatnonzero(observation.last):
            ends[index].append(step)
    assert all(len(steps) > 3 for steps in ends.values()) and ends[0] != ends[1]


@procgen
def test_procgen_shows_pictures_at_the_size_that_is_asked_for():
    large, small, theirs = make("StarpilotEasy-v0"), make("StarpilotEasy-v0", image_size=32), pool("StarpilotEasy-v0")
    observed, _ = theirs.reset()
    for step in range(80):
        frames = large.reset().frames if step == 0 else large.step(actions).frames  # noqa: F821 - of the step before
        np.testing.assert_array_equal(frames, observed.transpose(0, 2, 3, 1))
        actions = np.array([step % 15, 4])
        observed, *_ = theirs.step(actions.astype(np.int32))
    quarter = small.reset().frames
    whole = pool("StarpilotEasy-v0").reset()[0].transpose(0, 2, 3, 1).astype(np.float64)
    mean = whole.reshape(2, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert quarter.shape == (2, 32, 32, 3) and quarter.dtype == np.uint8
    assert np.abs(quarter - mean).max() <= 0.5


TASKS = ["CheetahRun-v1", "CartPole-v1", pytest.param("StarpilotEasy-v0", marks=procgen)]


@pytest.mark.parametrize("name", TASKS)
def test_a_saved_state_is_played_on_with_the_same_bits(name):
    env, other = (make(name, seed=5) for _ in range(2))
    rng = np.random.default_rng(1)

    def action():
        if isinstance(env.num_actions, Continuous):
            return rng.uniform(-1, 1, (2, env.num_actions.size)).astype(np.float32)
        return rng.integers(env.num_actions, size=2)

    env.reset()
    for step in range(70):
        last = env.reset() if step == 40 else env.step(action())
    reports = []
    back = other.set_state(env.get_state(), on_step=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (71, 71)
    for ours, theirs in zip(back, last):
        np.testing.assert_array_equal(ours, theirs)
    for _ in range(40):
        played = action()
        for ours, theirs in zip(other.step(played), env.step(played)):
            np.testing.assert_array_equal(ours, theirs)


def test_a_state_of_other_settings_is_refused():
    env = make("CheetahRun-v1", num_envs=1)
    env.reset()
    with pytest.raises(ConfigError, match="the saved environment is .*use the saved settings"):
        make("CheetahRun-v1", num_envs=1, max_episode_steps=5).set_state(env.get_state())
    with pytest.raises(StateMismatch):
        env.set_state(env.get_state()[:-1])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("CheetaRun-v1", f"EnvPool {envpool.__version__} has no task 'CheetaRun-v1'; did you mean CheetahRun-v1"),
        (None, "has no task None"),
        ("Pong-v5", "Pong-v5 is Atari: python -m experiments.atari100k --game Pong"),
        ("Taxi-v3", "Taxi-v3 shows neither a colour picture nor numbers, but Discrete(500)"),
        ("Go9x9-v1", "Go9x9-v1 shows neither a colour picture nor numbers"),
        ("MiniGrid-Empty-5x5-v0", "MiniGrid-Empty-5x5-v0 shows neither a colour picture nor numbers, but Dict("),
    ],
)
def test_what_is_no_task_is_one_line(name, line):
    with pytest.raises(ConfigError) as error:
        make(name)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_envs": 0}, "num_envs must be an integer from 1 to 4096, got 0"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"image_size": True}, "image_size must be an integer from 1 to 1024, got True"),
        ({"max_episode_steps": -1}, "TaskConfig.max_episode_steps must be >= 0, got -1"),
    ],
)
def test_a_number_out_of_range_is_one_line(options, line):
    with pytest.raises(ConfigError) as error:
        make("CheetahRun-v1", **options)
    assert line in str(error.value) and "\n" not in str(error.value)


@procgen
def test_procgen_keeps_to_its_own_step_limit():
    with pytest.raises(ConfigError, match=r"max_episode_steps must be 0 or 1000 for CoinrunEasy-v0, .* got 5"):
        make("CoinrunEasy-v0", max_episode_steps=5)


def test_without_qt_procgen_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError("EnvPool Procgen requires the system Qt 5 runtime on Linux.\nInstall it, for example via apt")

    monkeypatch.setattr(envpool, "make_spec", missing)
    with pytest.raises(ConfigError) as error:
        describe("CoinrunEasy-v0")
    assert str(error.value).startswith("CoinrunEasy-v0 cannot be started: EnvPool Procgen requires the system Qt 5")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("actions", "line"),
    [
        (np.zeros((2, 5), np.float32), r"2 floats of shape \(2, 6\), got float32 \(2, 5\)"),
        (np.zeros((2, 6), np.int32), r"2 floats of shape \(2, 6\), got int32"),
        (np.full((2, 6), 1.01), r"must lie in \[-1, 1\]"),
        (np.full((2, 6), np.nan), r"must lie in \[-1, 1\]"),
        ([[0.0], [0.0, 1.0]], "2 floats"),
    ],
)
def test_a_wrong_action_plays_nothing(actions, line):
    env = make("CheetahRun-v1")
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros((2, 6), np.float32))
    env.reset()
    state = env.get_state()
    with pytest.raises(ValueError, match=line):
        env.step(actions)
    assert env.get_state() == state


def test_numbers_that_are_not_finite_are_an_error_of_the_emulator(monkeypatch):
    env = make("CartPole-v1")
    with pytest.raises(RuntimeError, match="an observation is not finite"):
        env._vector(np.array([[0, np.nan, 0, 0], [0, 0, 0, 0]]))
    assert envpool_tasks.describe("CartPole-v1").shape == (4,)
