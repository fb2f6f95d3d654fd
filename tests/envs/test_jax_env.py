"""JAX environments as image environments."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.config import ConfigError
from drama_jax.envs.jax_env import JaxEnv


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
    assert env.image_shape == (7, 7, 1)
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
    assert JaxEnv(_Corridor(shape=(2, 3, 4)), None, 4).image_shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("shape", "message"), [((4,), r"must be \[rows, columns\]"), ((9, 2), "image_size must be at least 9")]
)
def test_what_is_no_board_is_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        JaxEnv(_Corridor(shape=shape), None, 6)
