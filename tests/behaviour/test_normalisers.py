"""Input statistics and return percentiles."""

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.behaviour import normalisers
from drama_jax.config import BehaviourConfig


def test_merging_batches_is_the_statistics_of_all_rows(x64):
    rows = 3 + 2 * jax.random.normal(jax.random.key(0), (60, 4), jnp.float64)
    # A negligible prior: count 1e-4 of mean 0, variance 1 against 60 rows.
    normaliser = normalisers.init_input(4, jnp.float64).replace(count=jnp.asarray(1e-30))
    for batch in (rows[:1], rows[1:20].reshape(1, 19, 4), rows[20:]):
        normaliser = normalisers.update(normaliser, batch)
    np.testing.assert_allclose(normaliser.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normaliser.variance, rows.var(0), rtol=1e-12)
    np.testing.assert_allclose(normaliser.count, 60, rtol=1e-12)


def test_apply_clips_at_ten_standard_deviations():
    normaliser = normalisers.InputNormaliser(
        mean=jnp.asarray([1.0, 0.0]), variance=jnp.asarray([4.0, 1e-30]), count=jnp.asarray(5.0)
    )
    result = normalisers.apply(normaliser, jnp.asarray([[5.0, 0.0], [-99.0, 1.0]]))
    np.testing.assert_allclose(result, [[2.0, 0.0], [-10.0, 10.0]], rtol=1e-6)


def test_apply_moves_nothing_and_keeps_the_statistics_dtype():
    normaliser = normalisers.update(normalisers.init_input(3), jnp.ones((4, 3), jnp.bfloat16))
    assert normaliser.mean.dtype == jnp.float32
    assert normalisers.apply(normaliser, jnp.ones((4, 3), jnp.bfloat16)).dtype == jnp.float32


def test_return_percentiles_are_kth_values():
    config = BehaviourConfig(return_scale_decay=0.5)
    values = jax.random.permutation(jax.random.key(0), jnp.arange(1.0, 55.0)).reshape(6, 9)
    scale = normalisers.update_return_scale(config, normalisers.init_return_scale(), values)
    # int(0.05 * 54) = 2, int(0.95 * 54) = 51, counted from 1.
    np.testing.assert_allclose([scale.lower, scale.upper], [1.0, 25.5])
    scale = normalisers.update_return_scale(config, scale, values + 10)
    np.testing.assert_allclose([scale.lower, scale.upper, scale.spread], [6.5, 43.25, 36.75])


def test_return_percentiles_of_a_few_values_start_at_the_smallest():
    config = BehaviourConfig(return_scale_decay=0.0)
    scale = normalisers.update_return_scale(config, normalisers.init_return_scale(), jnp.asarray([3.0, 1.0, 2.0]))
    np.testing.assert_allclose([scale.lower, scale.upper], [1.0, 2.0])
