"""Replay ring: windows against a plain deque, counters, and adding in place."""

import collections
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from drama_jax import dfs, replay
from drama_jax.config import ReplayConfig

CAPACITY, LENGTH, NUM = 11, 4, 3
IMAGE = (2, 3, 1)
CONFIG = ReplayConfig(capacity=CAPACITY, tau=3.0, imagination_tau=3.0)


def _transition(i):
    """The i-th step of an endless run; every field tells steps apart."""
    rng = np.random.default_rng(i)
    return replay.Transition(
        frame=rng.integers(0, 256, IMAGE, np.uint8),
        action=np.int32(i),
        reward=np.float32(i / 4),
        terminal=np.bool_(i % 5 == 4),
        first=np.bool_(i % 5 == 0),
    )


_add = jax.jit(replay.add, donate_argnums=0)
_gather = jax.jit(functools.partial(replay.gather, length=LENGTH))


@jax.jit
def _sample(ring, key):
    return replay.sample_training(CONFIG, ring, key, NUM, LENGTH)


@jax.jit
def _imagine(ring, key):
    return replay.sample_imagination(CONFIG, ring, key, NUM, 2, 1.0)


def _filled(steps, config=CONFIG):
    ring = replay.init(config, IMAGE)
    for i in range(steps):
        ring = _add(ring, _transition(i))
    return ring


def test_init_shapes_and_dtypes():
    ring = replay.init(CONFIG, IMAGE)
    shapes = {
        "frames": ((CAPACITY, *IMAGE), np.uint8),
        "actions": ((CAPACITY,), np.int32),
        "rewards": ((CAPACITY,), np.float32),
        "terminals": ((CAPACITY,), np.bool_),
        "firsts": ((CAPACITY,), np.bool_),
        "position": ((), np.int32),
        "size": ((), np.int32),
    }
    for name, (shape, dtype) in shapes.items():
        array = getattr(ring, name)
        assert (array.shape, array.dtype) == (shape, dtype), name
    assert ring.counters.trained.shape == ring.counters.imagined.shape == (CAPACITY,)
    assert ring.capacity == CAPACITY
    added = replay.add(ring, _transition(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), added) == jax.tree.map(lambda x: (x.shape, x.dtype), ring)


@pytest.mark.parametrize("steps", [LENGTH - 2, LENGTH, 9, CAPACITY, CAPACITY + 5])
def test_num_starts(steps):
    held = min(steps, CAPACITY)
    assert int(replay.num_starts(_filled(steps), LENGTH)) == max(held + 1 - LENGTH, 0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    script=st.lists(st.sampled_from(["add", "train", "imagine"]), min_size=1, max_size=40),
    seed=st.integers(0, 2**31 - 1),
)
def test_ring_against_a_deque(script, seed):
    """A deque of [transition, trained, imagined]: windows, counters, zeroed counters of overwritten entries."""
    oracle = collections.deque(maxlen=CAPACITY)
    ring = replay.init(CONFIG, IMAGE)
    for i in range(NUM + LENGTH):  # enough to draw from
        oracle.append([_transition(i), 0, 0])
        ring = _add(ring, _transition(i))
    keys = iter(jax.random.split(jax.random.key(seed), len(script)))
    for step in script:
        if step == "add":
            oracle.append([_transition(oracle[-1][0].action + 1), 0, 0])
            ring = _add(ring, oracle[-1][0])
            continue
        column, length = (1, LENGTH) if step == "train" else (2, 2)
        starts, ring = (_sample if step == "train" else _imagine)(ring, next(keys))
        starts = np.asarray(starts)
        assert len(set(starts.tolist())) == NUM
        assert (starts >= 0).all()
        assert (starts <= len(oracle) - length).all()
        for start in starts:
            oracle[start][column] += 1

    assert int(ring.size) == len(oracle)
    slots = (int(ring.position) - len(oracle) + np.arange(len(oracle))) % CAPACITY
    np.testing.assert_array_equal(ring.counters.trained[slots], [entry[1] for entry in oracle])
    np.testing.assert_array_equal(ring.counters.imagined[slots], [entry[2] for entry in oracle])
    starts = np.arange(len(oracle) + 1 - LENGTH)[-8:]
    starts = np.resize(starts, 8).astype(np.int32)  # one compiled shape
    batch = _gather(ring, starts)
    for row, start in enumerate(starts):
        window = [oracle[start + t][0] for t in range(LENGTH)]
        for field, name in (
            ("frames", "frame"),
            ("actions", "action"),
            ("rewards", "reward"),
            ("terminals", "terminal"),
            ("firsts", "first"),
        ):
            expected = np.stack([getattr(step, name) for step in window])
            np.testing.assert_array_equal(getattr(batch, field)[row], expected)


def test_windows_neither_pass_the_newest_entry_nor_cross_the_write_position():
    """Every start is drawn in the end, and the windows of all of them are runs of consecutive steps."""
    steps = 2 * CAPACITY + 3
    ring = _filled(steps)
    seen = set()
    for seed in range(60):
        starts, _ = _sample(ring, jax.random.key(seed))
        actions = np.asarray(_gather(ring, starts).actions)
        np.testing.assert_array_equal(np.diff(actions, axis=1), 1)
        assert actions.max() < steps
        seen.update(starts.tolist())
    assert seen == set(range(CAPACITY + 1 - LENGTH))


def test_overwriting_zeroes_the_counters_of_that_slot_only():
    ring = _filled(CAPACITY)
    seven = jnp.full(CAPACITY, 7, jnp.int32)
    ring = _add(ring.replace(counters=dfs.Counters(trained=seven, imagined=seven + 1)), _transition(99))
    np.testing.assert_array_equal(ring.counters.trained, [0] + [7] * (CAPACITY - 1))
    np.testing.assert_array_equal(ring.counters.imagined, [0] + [8] * (CAPACITY - 1))


def test_golden_batch(golden):
    data = golden("dfs_old")
    ring = replay.init(ReplayConfig(capacity=64), (8, 8, 3))
    for i in range(40):
        step = replay.Transition(
            frame=data["obs"][i],
            action=data["action"][i].astype(np.int32),
            reward=data["reward"][i],
            terminal=data["termination"][i],
            first=np.bool_(i == 0),
        )
        ring = _add(ring, step)
    batch = replay.gather(ring, jnp.asarray(data["start_wm"], jnp.int32), 6)
    frames = np.asarray(batch.frames).astype(np.float32).transpose(0, 1, 4, 2, 3) / 255
    np.testing.assert_allclose(frames, data["batch_world/obs"], rtol=1e-6)
    np.testing.assert_array_equal(batch.actions, data["batch_world/action"])
    np.testing.assert_array_equal(batch.rewards, data["batch_world/reward"])
    np.testing.assert_array_equal(batch.terminals, data["batch_world/termination"])
    np.testing.assert_array_equal(batch.firsts, data["start_wm"][:, None] + np.arange(6) == 0)


def test_draws_follow_the_counters_of_their_age():
    """On a ring whose write position is not 0: the one start never trained on is drawn first, nearly always."""
    ring = _filled(CAPACITY + 5)
    age, slot = 3, (5 + 3) % CAPACITY
    ring = ring.replace(counters=ring.counters.replace(trained=jnp.full(CAPACITY, 300, jnp.int32).at[slot].set(0)))
    for seed in range(10):
        starts, after = _sample(ring, jax.random.key(seed))
        assert starts[0] == age
        assert after.counters.trained[slot] == 1

    # Never trained on but imagined from: the least likely start of an imagination draw.
    imagined = jnp.zeros(CAPACITY, jnp.int32).at[slot].set(300)
    ring = ring.replace(counters=dfs.Counters(trained=jnp.zeros(CAPACITY, jnp.int32), imagined=imagined))
    for seed in range(10):
        assert age not in _imagine(ring, jax.random.key(seed))[0]


def test_uniform_sampler_ignores_the_counters_but_moves_them():
    config = ReplayConfig(capacity=CAPACITY, sampler="uniform", tau=0.1)
    ring = _filled(CAPACITY)
    skewed = ring.replace(counters=ring.counters.replace(trained=jnp.arange(CAPACITY, dtype=jnp.int32) * 100))
    for seed in range(5):
        key = jax.random.key(seed)
        starts, after = replay.sample_training(config, skewed, key, NUM, LENGTH)
        np.testing.assert_array_equal(starts, replay.sample_training(config, ring, key, NUM, LENGTH)[0])
        assert int((after.counters.trained - skewed.counters.trained).sum()) == NUM


def test_temperature_argument_overrides_the_configuration():
    ring = _filled(CAPACITY)
    ring = ring.replace(counters=ring.counters.replace(trained=jnp.arange(CAPACITY, dtype=jnp.int32)[::-1]))
    cold = jnp.float32(1e-3)
    starts, _ = replay.sample_training(CONFIG, ring, jax.random.key(0), NUM, LENGTH, tau=cold)
    np.testing.assert_array_equal(starts, [7, 6, 5])  # the least trained, in order
    imagined = ring.replace(counters=dfs.Counters(ring.counters.imagined, ring.counters.trained))
    starts, _ = replay.sample_imagination(CONFIG, imagined, jax.random.key(0), NUM, LENGTH, 1.0, tau=cold)
    np.testing.assert_array_equal(starts, [7, 6, 5])


def test_vmap_over_replays_equals_loop():
    rings = [_filled(steps) for steps in (8, CAPACITY, CAPACITY + 4)]
    keys = jax.random.split(jax.random.key(3), 3)

    def cycle(ring, key):
        ring = replay.add(ring, _transition(50))
        starts, ring = replay.sample_training(CONFIG, ring, key, NUM, LENGTH)
        return replay.gather(ring, starts, LENGTH), ring

    stacked = jax.jit(jax.vmap(cycle))(jax.tree.map(lambda *x: jnp.stack(x), *rings), keys)
    single = jax.jit(cycle)
    for i, (ring, key) in enumerate(zip(rings, keys)):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), stacked, single(ring, key))


def test_donated_add_writes_in_place():
    """No copy of the frames: the buffer stays where it was, and the executable needs no memory for a second one."""
    config = ReplayConfig(capacity=20_000)
    ring = replay.init(config, (64, 64, 3))
    step = _transition(0).replace(frame=np.zeros((64, 64, 3), np.uint8))
    memory = _add.lower(ring, step).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e5
    assert memory.alias_size_in_bytes >= ring.frames.nbytes
    before = ring.frames.unsafe_buffer_pointer()
    for _ in range(3):
        ring = _add(ring, step)
    assert ring.frames.unsafe_buffer_pointer() == before
