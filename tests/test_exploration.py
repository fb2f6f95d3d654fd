"""Random actions that last: the durations, and the two loops that play them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from drama_jax import exploration
from drama_jax.action_space import Continuous
from drama_jax.config import AtariConfig
from drama_jax.envs import jax_env, make_atari
from drama_jax.envs.jax_env import JaxEnv
from drama_jax.training import in_graph
from drama_jax.training.loop_state import Seat
from experiments.jax_presets import PRESETS

ACTIONS = 1_000_000_000  # so many that two draws are never the same


def played(seat, steps, table, num_actions=ACTIONS):
    return np.concatenate([seat.random_action(num_actions, table) for _ in range(steps)])


def lengths(actions):
    """Of the runs of one action, without the last, which may go on."""
    ends = np.flatnonzero(actions[1:] != actions[:-1]) + 1
    return np.diff(np.concatenate([[0], ends]))


def test_durations_are_proportional_to_a_power():
    np.testing.assert_allclose(exploration.duration_table(1.0, 2), [2 / 3, 1])
    np.testing.assert_allclose(exploration.duration_table(2.0, 3), np.cumsum([36, 9, 4]) / 49)
    assert exploration.duration_table(1.5, 1032)[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="duration_table: exponent must be a number in"):
        exploration.duration_table(-1.0, 2)


@pytest.mark.parametrize("exponent", [1.5, 3.0])
def test_actions_of_the_host_loop_last_as_the_table_says(exponent):
    table = exploration.duration_table(exponent, 50)
    found = lengths(played(Seat.fresh(jax.random.key(0)), 40_000, table))
    share = np.diff(table, prepend=0)
    for duration in (1, 2, 5):
        expected = share[duration - 1] * found.size
        assert abs((found == duration).sum() - expected) < 4 * np.sqrt(expected)
    assert found.max() <= 50


def test_without_durations_every_action_is_drawn():
    seat = Seat.fresh(jax.random.key(1))
    state = seat.warmup_rng.bit_generator.state
    found = played(seat, 20, None)
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    np.testing.assert_array_equal(found, [rng.integers(ACTIONS, size=1, dtype=np.int32)[0] for _ in range(20)])


@pytest.mark.parametrize("num_actions", [ACTIONS, Continuous(2)])
def test_an_action_lasts_over_a_stop(num_actions):
    table = exploration.duration_table(0.5, 50)
    whole = played(Seat.fresh(jax.random.key(2)), 60, table, num_actions)
    seat, again = Seat.fresh(jax.random.key(2)), Seat.fresh(jax.random.key(3))
    before = played(seat, 25, table, num_actions)
    assert seat.warmup_left > 0
    header = json.loads(json.dumps(seat.header()))
    again.warmup_rng.bit_generator.state = header["warmup_rng"]
    again.restore_warmup(header)
    np.testing.assert_array_equal(np.concatenate([before, played(again, 35, table, num_actions)]), whole)


def test_actions_of_the_loop_in_one_program_last_too():
    config = PRESETS["tiny"]().agent
    env = JaxEnv(*jax_env.load("Catch-bsuite"), 10)
    steps = 400

    def actions(repeats):
        kept = dataclasses.replace(config, warmup_repeats=repeats, warmup_steps=steps)
        play = jax.jit(lambda key: in_graph.play_randomly(env, steps, in_graph.begin(kept, env, key))[0])
        return np.asarray(play(jax.random.key(0)).agent.replay.actions[:steps])

    # Of three actions a third repeat by chance: 267 runs. Durations of exponent 2 up to 400 are 4 on average.
    assert 230 < lengths(actions(0.0)).size < 300
    assert 20 < lengths(actions(2.0)).size < 120


@pytest.mark.parametrize(("exponent", "points"), [(0.0, False), (1.5, True)])
def test_lasting_actions_cross_the_road_in_freeway(exponent, points):
    table = exploration.duration_table(exponent, 1032) if exponent else None
    env = make_atari("Freeway", AtariConfig(backend="ale"), num_envs=1, image_size=64, seed=0)
    env.reset()
    seat = Seat.fresh(jax.random.key(0))
    rewards = [env.step(seat.random_action(env.num_actions, table)).rewards[0] for _ in range(1032)]
    assert (sum(rewards) > 0) == points
