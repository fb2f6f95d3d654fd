"""DFS: probabilities against golden vectors, draws against the stated distribution."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from drama_jax import dfs
from tests.tools import lower_for_cuda

SETTINGS = [("a1.0_b1.0_t10_it10", 1.0, 1.0, 10.0, 10.0), ("a0.5_b2.0_t20_it5", 0.5, 2.0, 20.0, 5.0)]
SETTINGS += [("a0.0_b0.0_t20_it20", 0.0, 0.0, 20.0, 20.0)]
N = 24  # entries in the drawing tests


def _softmax(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize(("name", "alpha", "beta", "tau", "imagination_tau"), SETTINGS)
def test_probabilities_and_counters_are_the_released_ones(golden, x64, name, alpha, beta, tau, imagination_tau):
    data = golden("dfs_old")
    stored, length, imagination_length, ratio = 40, 6, 3, 16 / 4
    trained, imagined = jnp.asarray(data["sampled_counter0"]), jnp.asarray(data["imagined_counter0"])

    world = _softmax(dfs.training_logits(trained, tau)[: stored + 1 - length])
    trained = dfs.increment(trained, jnp.asarray(data["start_wm"]))
    logits = dfs.imagination_logits(trained, imagined, ratio, imagination_tau, alpha, beta)
    imagine = _softmax(logits[: stored + 1 - imagination_length])
    imagined = dfs.increment(imagined, jnp.asarray(data["start_img"]))

    for branch, rtol in (("numpy", 1e-12), ("torch", 1e-6)):  # the torch branch computes in float32
        np.testing.assert_allclose(world, data[f"{name}/{branch}/world/prob"], rtol=rtol)
        np.testing.assert_allclose(imagine, data[f"{name}/{branch}/imagine/prob"], rtol=rtol)
        np.testing.assert_array_equal(trained, data[f"{name}/{branch}/sampled_counter_after"])
        np.testing.assert_array_equal(imagined, data[f"{name}/{branch}/imagined_counter_after"])


def test_logits_in_literal_cases():
    trained, imagined = jnp.array([0, 3, 10], jnp.int32), jnp.array([0, 640, 64], jnp.int32)
    np.testing.assert_allclose(dfs.training_logits(trained, 10.0), [0.0, -0.3, -1.0], rtol=1e-6)
    # imagined / 64 = 0, 10, 1
    np.testing.assert_allclose(dfs.imagination_logits(trained, imagined, 64.0, 10.0), [0.0, -0.7, 0.0], rtol=1e-6)
    unequal = dfs.imagination_logits(trained, imagined, 64.0, 2.0, 0.5, 2.0)
    np.testing.assert_allclose(unequal, [0.0, (3 - 5) / 2, (10 - 0.5 - 18) / 2], rtol=1e-6)


def test_temperature_may_be_traced_and_sets_the_dtype(x64):
    trained = jnp.arange(5, dtype=jnp.int32)
    for dtype in (jnp.float32, jnp.float64):
        logits = jax.jit(dfs.training_logits)(trained, jnp.asarray(4.0, dtype))
        assert logits.dtype == dtype
        np.testing.assert_allclose(logits, -np.arange(5) / 4)
    assert dfs.training_logits(trained, 4.0).dtype == jnp.float64


def test_huge_counters_give_a_valid_draw():
    # exp(-c / tau) underflows for every entry here; the released torch branch divides 0 by 0.
    trained = jnp.full(N, 100_000, jnp.int32).at[5].set(99_000)
    logits = dfs.training_logits(trained, 1.0)
    assert np.isfinite(logits).all()
    drawn = jax.vmap(lambda key: dfs.sample(key, logits, N, 1))(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_array_equal(drawn, 5)


@functools.cache
def _sampler(num):
    return jax.jit(functools.partial(dfs.sample, num=num))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 100_000), min_size=N, max_size=N),
    seed=st.integers(0, 2**31 - 1),
    num=st.sampled_from([1, 4, 9]),
    extra=st.integers(0, N),
)
def test_draws_are_valid_and_distinct(counts, seed, num, extra):
    size = min(num + extra, N)
    logits = dfs.training_logits(jnp.asarray(counts, jnp.int32), 10.0)
    drawn = np.asarray(_sampler(num)(jax.random.key(seed), logits, size))
    assert drawn.shape == (num,)
    assert drawn.dtype == np.int32
    assert (drawn >= 0).all()
    assert (drawn < size).all()
    assert len(set(drawn.tolist())) == num


_compared = jax.jit(dfs.largest_by_comparison, static_argnums=1)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.sampled_from([(1, 1), (7, 3), (1000, 1), (1000, 400), (4097, 16), (30_000, 16), (70_000, 700)]),
    levels=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_largest_is_top_k_with_equals_in_their_order(sizes, levels, seed):
    size, num = sizes
    rng = np.random.default_rng(seed)
    values = jnp.asarray(np.where(rng.random(size) < 0.3, -np.inf, rng.integers(levels, size=size)), jnp.float32)
    expected = np.argsort(-np.asarray(values), kind="stable")[:num]
    for way in (_compared, jax.jit(dfs.largest, static_argnums=1)):
        np.testing.assert_array_equal(way(values, num), expected)


@pytest.mark.parametrize(("num", "sorts"), [(16, 0), (1024, 0), (5_000, 1), (40_000, 1)])
def test_accelerators_sort_nothing_for_few_of_a_full_replay(num, sorts):
    values = jax.random.gumbel(jax.random.key(0), (100_000,))
    np.testing.assert_array_equal(_compared(values, num), jax.lax.top_k(values, num)[1])
    text = lower_for_cuda(lambda values: dfs.largest(values, num), values)
    assert text.count("chlo.top_k") + text.count("stablehlo.sort") == sorts


def test_largest_of_several_at_once():
    values = jax.random.gumbel(jax.random.key(2), (3, 9_000))
    found = jax.jit(jax.vmap(lambda values: dfs.largest_by_comparison(values, 300)))(values)
    np.testing.assert_array_equal(found, jax.lax.top_k(values, 300)[1])


def test_largest_is_int32_in_float64_too(x64):
    values = jax.random.gumbel(jax.random.key(1), (5_000,))
    found = _compared(values, 16)
    assert values.dtype == jnp.float64 and found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argsort(-np.asarray(values), kind="stable")[:16])


def test_one_trace_serves_every_size():
    traces = []

    @jax.jit
    def draw(key, logits, size):
        traces.append(1)
        return dfs.sample(key, logits, size, 3)

    for size in (3, 10, N):
        assert draw(jax.random.key(size), jnp.zeros(N), size).max() < size
    assert len(traces) == 1


def _chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


def _draw_many(logits, size, num, draws=20_000):
    keys = jax.random.split(jax.random.key(7), draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: dfs.sample(key, logits, size, num)))(keys))


def test_frequencies_match_the_stated_probabilities():
    """First draw ~ softmax(logits); second draw ~ the same with the first removed. 99.99 % quantiles of chi-square."""
    size = 12
    trained = jnp.asarray(np.random.default_rng(0).integers(0, 30, N), jnp.int32)
    logits = dfs.training_logits(trained, 10.0)
    p = _softmax(logits[:size])
    drawn = _draw_many(logits, size, 2)

    first = np.bincount(drawn[:, 0], minlength=N)
    assert first[size:].sum() == 0
    assert _chi_square(first[:size], p) < 37.4  # 11 degrees of freedom
    assert _chi_square(first[:size], np.full(size, 1 / size)) > 100  # the bound would catch uniform sampling

    without = p[:, None] * p[None, :] / (1 - p[:, None])  # [i, j]: i first, j second
    np.fill_diagonal(without, 0.0)
    second = np.bincount(drawn[:, 1], minlength=N)[:size]
    assert _chi_square(second, without.sum(0)) < 37.4
    assert _chi_square(second, p) > 100  # the bound would catch drawing with replacement


def test_zero_logits_are_uniform():
    counts = np.bincount(_draw_many(jnp.zeros(N), 10, 1)[:, 0], minlength=N)
    assert counts[10:].sum() == 0
    assert _chi_square(counts[:10], np.full(10, 0.1)) < 33.8  # 9 degrees of freedom


def test_vmap_equals_loop():
    keys = jax.random.split(jax.random.key(1), 4)
    logits = -jnp.asarray(np.random.default_rng(1).integers(0, 50, (4, N)), jnp.float32) / 10
    sizes = jnp.array([5, 9, 17, N])
    stacked = jax.vmap(lambda key, row, size: dfs.sample(key, row, size, 5))(keys, logits, sizes)
    for i in range(4):
        np.testing.assert_array_equal(stacked[i], dfs.sample(keys[i], logits[i], sizes[i], 5))


def test_increment_counts_each_index_once():
    counter = dfs.increment(jnp.array([1, 2, 3, 4], jnp.int32), jnp.array([3, 0], jnp.int32))
    np.testing.assert_array_equal(counter, [2, 2, 3, 5])
