"""Catch with a sparse reward, and with one that changes sign."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.envs import jax_env
from drama_jax.envs.catch_tasks import CatchParams, PairCatch, SparseCatch, SwitchingCatch

LEFT, STAY, RIGHT = range(3)


def play(env, steps, policy, params=None, seed=0):
    """(boards, rewards, ends) of `steps` steps; `policy` sees the state."""
    params = env.default_params if params is None else params
    board, state = env.reset(jax.random.key(seed), params)

    def body(state, key):
        board, state, reward, terminated, truncated, _ = env.step(key, state, policy(state), params)
        return state, (board, reward, terminated, truncated)

    scan = jax.jit(lambda state, keys: jax.lax.scan(body, state, keys))
    _, (boards, rewards, ends, truncated) = scan(state, jax.random.split(jax.random.key(seed + 1), steps))
    assert not truncated.any()
    return np.concatenate([board[None], boards]), np.asarray(rewards), np.asarray(ends)


def catcher(state):
    return jnp.sign(state.ball[1] - state.paddle) + 1


def misser(state):
    """Away from the ball; in its column, wherever there is room."""
    return jnp.where(state.ball[1] >= 3, LEFT, RIGHT)


def test_a_ball_falls_a_row_a_step_and_another_one_follows():
    boards, _, ends = play(SparseCatch(), 27, catcher)
    for step, board in enumerate(boards[:-1]):
        rows = np.flatnonzero(board[:-1].any(axis=1))
        np.testing.assert_array_equal(rows, [step % 9])
    np.testing.assert_array_equal(np.flatnonzero(ends), [26])
    assert set(np.unique(boards)) == {0, 1} and boards.shape == (28, 10, 5)


@pytest.mark.parametrize("env", [PairCatch(), SparseCatch()])
def test_all_balls_must_be_caught_for_the_sparse_reward(env):
    _, rewards, ends = play(env, 270, catcher)
    np.testing.assert_array_equal(np.flatnonzero(ends) % (9 * env.balls), 9 * env.balls - 1)
    np.testing.assert_array_equal(rewards, ends)
    assert not play(env, 270, misser)[1].any()
    # All but one are not enough.
    nearly = lambda state: jnp.where(state.fallen == 1, misser(state), catcher(state))  # noqa: E731
    assert not play(env, 270, nearly)[1].any()


@pytest.mark.parametrize(("env", "chance"), [(PairCatch(), 1 / 25), (SparseCatch(), 1 / 125)])
def test_random_play_is_seldom_paid(env, chance):
    # A ball's column is drawn without a look at the paddle: one of five is caught.
    walk = lambda state: jax.random.randint(jax.random.fold_in(jax.random.key(5), state.age), (), 0, 3)  # noqa: E731
    _, rewards, ends = play(env, 27 * 4000, walk)
    error = (chance * (1 - chance) / ends.sum()) ** 0.5
    assert abs(rewards.sum() / ends.sum() - chance) < 4 * error


def test_rewards_change_their_sign_every_period_and_nothing_else_does():
    params = CatchParams(steps_between_switches=18)
    boards, rewards, ends = play(SwitchingCatch(), 90, catcher, params)
    np.testing.assert_array_equal(np.flatnonzero(ends) % 9, 8)
    np.testing.assert_array_equal(rewards[ends], [1, 1, -1, -1, 1, 1, -1, -1, 1, 1])
    same, plain, _ = play(SwitchingCatch(), 90, catcher, CatchParams())
    np.testing.assert_array_equal(boards, same)
    np.testing.assert_array_equal(plain[ends], np.ones(10))
    np.testing.assert_array_equal(play(SwitchingCatch(), 90, misser, params)[1], -rewards)


@pytest.mark.parametrize("name", ["PairCatch", "SparseCatch", "SwitchingCatch"])
def test_the_agent_sees_them(name):
    env = jax_env.make(f"drama_jax.envs.catch_tasks:{name}", 10)
    assert env.num_actions == 3 and env.frame_shape == (10, 10, 1)
    state = env.reset(jax.random.key(0))
    assert state.frame.dtype == jnp.uint8 and set(np.unique(state.frame)) == {0, 255}


def test_sizes_that_make_no_game_are_refused():
    with pytest.raises((TypeError, ValueError), match="rows must be an integer from 2"):
        SparseCatch(rows=1)
