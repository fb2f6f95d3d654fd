"""JAX environments: what the agent sees of boards and vectors, and what its actions are there."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.action_space import Continuous
from drama_jax.config import ConfigError
from drama_jax.envs import jax_env
from drama_jax.envs.jax_env import JaxEnv, JaxEnvState


@flax.struct.dataclass
class _Count:
    time: jax.Array


class _Space:
    def __init__(self, shape, low=0.0, high=1.0):
        self.shape, self.low, self.high = shape, low, high


class _Corridor:
    """A 2 x 3 board; the position is the time. Action 1 ends the episode with reward 5; three steps truncate it."""

    num_actions = 2

    def __init__(self, shape=(2, 3), high=1.0):
        self.space = _Space(shape, high=high)

    def observation_space(self, params):
        return self.space

    def reset(self, key, params):
        return self._board(0), _Count(jnp.int32(0))

    def step(self, key, state, action, params):
        time = state.time + 1
        terminated, truncated = action == 1, time >= 3
        time = jnp.where(terminated | truncated, 0, time)
        return self._board(time), _Count(time), 5 * terminated, terminated, truncated, {}

    def _board(self, time):
        return jnp.zeros(self.space.shape).at[1, time].set(self.space.high)


def test_frames_are_enlarged_by_whole_factors_and_centred():
    env = JaxEnv(_Corridor(high=2.0), None, 7)
    assert env.frame_shape == (7, 7, 1)
    frame = np.asarray(env.reset(jax.random.key(0)).frame)
    assert frame.dtype == np.uint8 and frame.shape == (7, 7, 1)
    expected = np.zeros((7, 7), np.uint8)
    expected[3:6, 0:2] = 255  # rows x3 centred in 7 with nothing left above, columns x2
    np.testing.assert_array_equal(frame[..., 0], expected)


def test_an_episode_end_keeps_its_reward_and_flags_the_next_frame():
    env = JaxEnv(_Corridor(), None, 6)
    step = jax.jit(env.step)
    state = env.reset(jax.random.key(0))
    assert bool(state.first)
    trace = []
    for action in (0, 1, 0, 0, 0, 0):
        frame = state.frame
        state, outcome = step(state, jnp.int32(action), jax.random.key(1))
        position = int(np.asarray(frame)[3].argmax()) // 2
        flags = (bool(outcome.terminal), bool(outcome.last), bool(state.first))
        trace.append((position, float(outcome.reward), *flags))
    assert trace == [
        (0, 0.0, False, False, False),
        (1, 5.0, True, True, True),  # the action's own reward, and the next frame starts an episode
        (0, 0.0, False, False, False),
        (1, 0.0, False, False, False),
        (2, 0.0, False, True, True),  # truncated: the episode ends, but is no terminal
        (0, 0.0, False, False, False),
    ]


def test_channels_are_kept():
    assert JaxEnv(_Corridor(shape=(2, 3, 4)), None, 4).frame_shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((), "a vector, got shape \\(\\)"), ((0,), "got shape"), ((9, 2), "image_size must be at least 9")],
)
def test_what_is_no_board_and_no_vector_is_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        JaxEnv(_Corridor(shape=shape), None, 6)


class _Echo:
    """Sees its last action, a number in front; action 3 or beyond ends the episode, the fourth step cuts it off."""

    def __init__(self, low, high, shape, seen=None):
        self._space, self._seen = _Space(shape, low, high), seen
        self.size = 1 + int(np.prod(shape))

    def action_space(self, params):
        return self._space

    def observation_space(self, params):
        return self._seen or _Space((self.size,), -np.inf, np.inf)

    def reset(self, key, params):
        return jnp.zeros(self.size), _Count(jnp.int32(0))

    def step(self, key, state, action, params):
        assert action.shape == self._space.shape
        terminated, truncated = jnp.any(action >= 3), state.time == 3
        after = jnp.where(terminated | truncated, 0, state.time + 1)
        seen = jnp.append(1e6, action.reshape(-1))
        return seen, _Count(after), action.sum(), terminated, truncated, {}


@pytest.mark.parametrize(
    ("low", "high", "shape", "played"),
    [
        (-2.0, 2.0, (1,), {-1.0: [-2.0], 0.0: [0.0], 0.5: [1.0], 1.0: [2.0], 7.0: [2.0]}),
        (np.array([0.0, -1.0]), np.array([10.0, 1.0]), (2,), {-1.0: [0.0, -1.0], 0.0: [5.0, 0.0], 1.0: [10.0, 1.0]}),
        (2.0, 4.0, (), {-1.0: [2.0], 1.0: [4.0]}),
    ],
)
def test_actions_are_scaled_to_the_range_of_the_environment(low, high, shape, played):
    env = JaxEnv(_Echo(low, high, shape), None, 1)
    size = int(np.prod(shape))
    assert env.num_actions == Continuous(size) and env.frame_shape == (1 + size,)
    state = env.reset(jax.random.key(0))
    assert state.frame.dtype == jnp.float32 and state.frame.shape == (1 + size,)
    for action, expected in played.items():
        after, outcome = env.step(state, jnp.full(size, action, jnp.float32), jax.random.key(1))
        np.testing.assert_array_equal(after.frame, [1e6, *expected])  # neither clipped nor scaled
        assert float(outcome.reward) == sum(expected)


def test_a_vector_environment_ends_or_is_cut_off():
    env = JaxEnv(_Echo(0.0, 4.0, (1,)), None, 1)
    step = jax.jit(env.step)
    for time, action, terminal, last in ((0, -1, 0, 0), (0, 1, 1, 1), (3, 0, 0, 1), (3, 1, 1, 1)):
        state = JaxEnvState(inner=_Count(jnp.int32(time)), frame=jnp.zeros(2), first=jnp.zeros((), bool))
        after, outcome = step(state, jnp.full(1, action, jnp.float32), jax.random.key(1))
        assert (bool(outcome.terminal), bool(outcome.last), bool(after.first)) == (terminal, last, last)


def test_one_of_several_numbers_is_seen_one_hot():
    class Number(_Echo):
        def reset(self, key, params):
            return jnp.int32(2), _Count(jnp.int32(0))

    seen = _Space(())
    seen.n = 4
    env = JaxEnv(Number(-1.0, 1.0, (1,), seen), None, 1)
    assert env.frame_shape == (4,)
    frame = env.reset(jax.random.key(0)).frame
    assert frame.dtype == jnp.float32 and frame.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ((-np.inf, 1.0, (2,)), r"actions must lie between finite bounds, got \[-inf, -inf\] and \[1.0, 1.0\]"),
        ((1.0, 1.0, (1,)), "actions must lie between finite bounds"),
        ((-1.0, 1.0, (2, 2)), "actions must be one of several, or numbers between bounds"),
    ],
)
def test_actions_without_a_range_are_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        JaxEnv(_Echo(*space), None, 1)


@pytest.mark.parametrize(
    ("name", "actions", "shape"),
    [
        ("CartPole-v1", 2, (4,)),
        ("Pendulum-v1", Continuous(1), (3,)),
        ("MountainCarContinuous-v0", Continuous(1), (2,)),
        ("PointRobot-misc", Continuous(2), (6,)),
        ("FrozenLake-misc", 4, (16,)),
    ],
)
def test_spaces_of_gymnax_are_read(name, actions, shape):
    env = jax_env.make(name, 1)
    assert env.num_actions == actions and env.frame_shape == shape
    assert jax.eval_shape(env.reset, jax.random.key(0)).frame.shape == shape


def test_pendulum_plays_with_twice_the_action():
    env, (theirs, params) = jax_env.make("Pendulum-v1", 1), jax_env.load("Pendulum-v1")
    state = env.reset(jax.random.key(0))
    after, outcome = jax.jit(env.step)(state, jnp.full(1, 0.5, jnp.float32), jax.random.key(1))
    seen, _, reward, *_ = theirs.step(jax.random.key(1), state.inner, jnp.ones(1), params)
    np.testing.assert_allclose(after.frame, seen, rtol=1e-6)
    np.testing.assert_allclose(outcome.reward, reward, rtol=1e-6)
