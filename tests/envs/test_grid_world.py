"""The grid world: its rules, and that nothing but memory tells the next frame."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.envs import jax_env
from drama_jax.envs.grid_world import GridParams, GridWorld, walk

ENV = GridWorld()
UP, DOWN, LEFT, RIGHT = range(4)


@pytest.fixture(scope="module")
def step():
    return jax.jit(ENV.step)


def play(step, actions, params=None, seed=0):
    """(frame, reward, truncated) after every action, from the state after a reset; the colours of the first episode."""
    frame, state = ENV.reset(jax.random.key(seed))
    colours, trace = np.asarray(state.colours), [(np.asarray(frame), 0.0, False)]
    for index, action in enumerate(actions):
        gap = int(ENV.gap(state, jnp.int32(action)))
        key = jax.random.key(100 + index)
        frame, state, reward, terminated, truncated, _ = step(key, state, jnp.int32(action), params or GridParams())
        assert not terminated and float(reward) == (gap == 0)
        trace.append((np.asarray(frame), float(reward), bool(truncated)))
    return colours, trace


def test_a_frame_shows_the_colour_under_the_agent_and_nothing_else(step):
    # Once around a square, then into the wall above.
    actions = [UP, LEFT, DOWN, RIGHT, UP, UP, UP]
    cells = [(2, 2), (1, 2), (1, 1), (2, 1), (2, 2), (1, 2), (0, 2), (0, 2)]
    colours, trace = play(step, actions)
    assert colours.min() >= 1 and colours.max() <= 4
    for (frame, _, _), cell in zip(trace, cells):
        expected = np.zeros((5, 5), np.int32)
        expected[cell] = colours[cell]
        np.testing.assert_array_equal(frame, expected)
    assert [reward for _, reward, _ in trace[1:]] == [1, 1, 1, 0, 0, 1, 0]


def test_the_border_stops_the_agent(step):
    for action, cell in ((UP, (0, 2)), (DOWN, (4, 2)), (LEFT, (2, 0)), (RIGHT, (2, 4))):
        _, trace = play(step, [action] * 3)
        assert [np.argwhere(frame).tolist() for frame, _, _ in trace[2:]] == [[list(cell)]] * 2


def test_gaps_count_back_to_the_last_frame_with_the_cell():
    _, state = ENV.reset(jax.random.key(0))
    gaps = []
    for action in (UP, DOWN, UP, LEFT, LEFT, LEFT, RIGHT, RIGHT):
        gaps.append(int(ENV.gap(state, jnp.int32(action))))
        _, state, *_ = ENV.step(jax.random.key(1), state, jnp.int32(action))
    # (1,2) new; (2,2), (1,2) two back; (1,1), (1,0) new; at the wall: one back; (1,1) three back; (1,2) five.
    assert gaps == [0, 2, 2, 0, 0, 1, 3, 5]


def test_an_episode_is_cut_off_and_the_next_has_other_colours(step):
    _, trace = play(step, [UP] * 6, GridParams(max_steps_in_episode=3))
    assert [truncated for _, _, truncated in trace] == [False, False, False, True, False, False, True]
    assert np.argwhere(trace[3][0]).tolist() == [[2, 2]]  # the first frame of the next episode
    assert [reward for _, reward, _ in trace[1:]] == [1, 1, 0, 1, 1, 0]
    boards = {play(step, [], seed=seed)[0].tobytes() for seed in range(5)}
    assert len(boards) == 5


def test_colours_are_uniform():
    reset = jax.jit(jax.vmap(lambda key: ENV.reset(key)[1].colours))
    colours = np.asarray(reset(jax.random.split(jax.random.key(0), 2000)))
    counts = np.bincount(colours.ravel(), minlength=5)
    assert counts[0] == 0
    # 50,000 draws: five standard deviations of a binomial share are 0.01.
    np.testing.assert_allclose(counts[1:] / counts.sum(), 0.25, atol=0.01)


@pytest.fixture(scope="module")
def walks():
    """64 walks of 64 steps."""
    return jax.vmap(lambda key: walk(ENV, key, 64))(jax.random.split(jax.random.key(0), 64))


def test_who_remembers_every_frame_knows_what_comes_where_it_has_been(walks):
    frames, actions, gaps, rewards = map(np.asarray, (walks.frames, walks.actions, walks.gaps, walks.rewards))
    assert frames.shape == (64, 64, 5, 5) and (gaps[:, 0] == 0).all()
    moves = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])
    for board, taken, back, earned in zip(frames, actions, gaps, rewards):
        where = [tuple(np.argwhere(frame)[0]) for frame in board]
        for t in range(1, 64):
            assert where[t] == tuple(np.clip(where[t - 1] + moves[taken[t - 1]], 0, 4))
            before = [s for s in range(t) if where[s] == where[t]]
            assert back[t] == (t - before[-1] if before else 0)
            assert earned[t - 1] == (not before)
            if before:
                np.testing.assert_array_equal(board[t], board[before[-1]])


def test_memory_of_long_past_steps_is_asked_for(walks):
    gaps = np.asarray(walks.gaps)
    back = gaps[gaps > 0]
    # Of the frames that can be told, these need more than the 8 steps of a short sequence, or than 32.
    assert (back > 8).mean() > 0.15 and (back > 32).mean() > 0.01
    assert 0.5 < (gaps > 0).mean() < 0.9


def test_tokens_are_26_a_step(walks):
    tokens = np.asarray(ENV.tokens(walks.frames, walks.actions))
    assert tokens.shape == (64, 1664) and ENV.num_tokens == 9
    assert ENV.tokens(walks.frames[:, :8], walks.actions[:, :8]).shape == (64, 208)
    steps = tokens.reshape(64, 64, 26)
    np.testing.assert_array_equal(steps[..., :25].reshape(64, 64, 5, 5), walks.frames)
    np.testing.assert_array_equal(steps[..., 25], np.asarray(walks.actions) + 5)


def test_it_is_an_environment_for_the_agent():
    env = jax_env.make("drama_jax.envs.grid_world:GridWorld", image_size=10)
    assert env.frame_shape == (10, 10, 1) and env.num_actions == 4
    state = env.reset(jax.random.key(0))
    after, outcome = jax.jit(env.step)(state, jnp.int32(UP), jax.random.key(1))
    assert float(outcome.reward) == 1 and not outcome.last
    assert np.asarray(after.frame)[2:4, 4:6].min() > 0 and np.asarray(after.frame).astype(bool).sum() == 4


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda: GridWorld(size=4), ValueError, "GridWorld: size must be odd, so that there is a middle, got 4"),
        (lambda: GridWorld(size=1), ValueError, "GridWorld: size must be an integer from 3 to 63, got 1"),
        (lambda: GridWorld(colours=1), ValueError, "GridWorld: colours must be an integer from 2 to 255, got 1"),
        (lambda: walk(ENV, jax.random.key(0), 0), ValueError, "grid_world.walk: steps must be an integer from 1 to"),
        (lambda: ENV.step(jax.random.key(0), None, 0), TypeError, "GridWorld.step: state must be of type GridState"),
        (
            lambda: ENV.tokens(jnp.zeros((3, 4, 4)), jnp.zeros(3)),
            ValueError,
            "GridWorld.tokens: frames must be int32 [",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(call, error, line):
    with pytest.raises(error) as raised:
        call()
    assert line in str(raised.value) and str(raised.value).count("\n") == 0
