"""Distributions: golden vectors of the released code in float64 and float32, literal cases, invariants."""

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import distributions

BINS = 255
few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture
def vectors(golden):
    return golden("symlog_twohot")


def test_bins_are_bit_exact(vectors):
    bins = distributions.two_hot_bins(BINS, jnp.float32)
    np.testing.assert_array_equal(bins, vectors["bins"])


def test_bins_widen_without_new_digits(x64, vectors):
    bins = distributions.two_hot_bins(BINS, jnp.float64)
    assert bins.dtype == jnp.float64
    np.testing.assert_array_equal(bins, vectors["bins"].astype(np.float64))


def test_symlog_golden(x64, vectors):
    targets = vectors["targets"].astype(np.float64)
    np.testing.assert_allclose(distributions.symlog(targets), vectors["symlog"], rtol=1e-13)
    np.testing.assert_allclose(distributions.symexp(distributions.symlog(targets)), targets, rtol=1e-12)


def test_two_hot_golden(x64, vectors):
    rows = np.asarray(distributions.two_hot(jnp.asarray(vectors["targets"], jnp.float64), BINS))
    np.testing.assert_allclose(rows, vectors["twohot"], rtol=1e-9, atol=1e-12)
    upper, weight = vectors["upper_index"], vectors["upper_weight"]
    index = np.arange(len(rows))
    np.testing.assert_allclose(rows[index, upper], weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rows[index, upper - 1], 1 - weight, rtol=1e-9, atol=1e-12)


def test_two_hot_loss_golden(x64, vectors):
    logits = jnp.asarray(vectors["logits"], jnp.float64)
    targets = jnp.asarray(vectors["targets"], jnp.float64)
    loss = distributions.two_hot_loss(logits, targets)
    np.testing.assert_allclose(loss, vectors["loss_each"], rtol=1e-12)
    mean, gradient = jax.value_and_grad(lambda x: distributions.two_hot_loss(x, targets).mean())(logits)
    np.testing.assert_allclose(mean, vectors["loss_mean"], rtol=1e-12)
    np.testing.assert_allclose(gradient, vectors["grad_logits_of_mean"], rtol=1e-9, atol=1e-15)


def test_two_hot_decode_golden(x64, vectors):
    logits = jnp.asarray(vectors["logits"], jnp.float64)
    np.testing.assert_allclose(distributions.two_hot_decode(logits), vectors["decode"], rtol=1e-12)
    one_hot_logits = jnp.where(jnp.eye(BINS, dtype=bool), 0.0, -1e30)
    # The absolute part is float64 rounding of exp(|x|) - 1 in the stored values; expm1 has none at the centre bin.
    decoded = distributions.two_hot_decode(one_hot_logits)
    np.testing.assert_allclose(decoded, vectors["decode_onehot"], rtol=1e-12, atol=3e-16)
    # Zero logits decode to the mean of the float32 bins: what rounding left over, 1e-11 of the largest bin.
    zero = distributions.two_hot_decode(jnp.zeros((1, BINS), jnp.float64))
    np.testing.assert_allclose(zero, vectors["decode_zero_logits"], rtol=1e-5)


def test_two_hot_float32_golden(vectors):
    logits, targets = jnp.asarray(vectors["logits"]), jnp.asarray(vectors["targets"])
    loss = distributions.two_hot_loss(logits, targets)
    assert loss.dtype == jnp.float32
    # Of |symlog| <= 20 and a spacing of 0.157, float32 leaves the weights 1e-5 uncertain, and the loss with them.
    np.testing.assert_allclose(loss, vectors["loss_each_float32"], rtol=2e-5)
    np.testing.assert_allclose(distributions.two_hot_decode(logits), vectors["decode_float32"], rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_widened(vectors):
    logits = jnp.asarray(vectors["logits"]).astype(jnp.bfloat16)
    chex.assert_type(distributions.two_hot_decode(logits), jnp.float32)
    chex.assert_type(distributions.two_hot_loss(logits, jnp.asarray(vectors["targets"])), jnp.float32)
    chex.assert_type(distributions.categorical_entropy(logits), jnp.float32)


@pytest.mark.parametrize("case", ["kl_above", "kl_below"])
def test_free_bits_golden(x64, vectors, case):
    p, q = (jnp.asarray(vectors[f"{case}/{name}_logits"]) for name in "pq")
    loss, mean = distributions.free_bits_kl(p, q, 1.0)
    np.testing.assert_allclose(loss, vectors[f"{case}/loss"], rtol=1e-12)
    np.testing.assert_allclose(mean, vectors[f"{case}/real"], rtol=1e-11)
    gradients = jax.grad(lambda p, q: distributions.free_bits_kl(p, q, 1.0)[0], argnums=(0, 1))(p, q)
    np.testing.assert_allclose(gradients[0], vectors[f"{case}/grad_p"], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(gradients[1], vectors[f"{case}/grad_q"], rtol=1e-9, atol=1e-15)


def test_free_bits_of_each_step_keep_the_gradient_of_the_large_ones(x64):
    p = jnp.log(jnp.asarray([[[0.5, 0.5]], [[0.999, 0.001]], [[0.9, 0.1]]]))
    q = jnp.log(jnp.asarray([[[0.5, 0.5]], [[0.1, 0.9]], [[0.8, 0.2]]]))
    kl = distributions.categorical_kl(p, q)
    assert kl.mean() < 1 < kl[1]
    of_mean = jax.grad(lambda q: distributions.free_bits_kl(p, q, 1.0)[0])(q)
    np.testing.assert_array_equal(of_mean, 0)
    of_each = jax.grad(lambda q: distributions.free_bits_kl(p, q, 1.0, each=True)[0])(q)
    np.testing.assert_allclose(of_each, jax.grad(lambda q: distributions.categorical_kl(p[1:2], q[1:2]).sum() / 3)(q))
    assert of_each[1].any()
    np.testing.assert_allclose(distributions.free_bits_kl(p, q, 1.0, each=True), [(2 + kl[1]) / 3, kl.mean()])


def test_categorical_kl_literal(x64):
    p = jnp.log(jnp.asarray([[0.5, 0.5], [1.0, 1.0]]))
    q = jnp.log(jnp.asarray([[0.25, 0.75], [3.0, 3.0]]))
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(distributions.categorical_kl(p, q), expected, rtol=1e-12)


def test_unimix_golden(x64, vectors):
    logits = jnp.asarray(vectors["unimix_in"])
    # The stored mixture has K = C = 8 but only five rows: pad to eight.
    padded = jnp.concatenate([logits, jnp.zeros((4, 3, 8), logits.dtype)], axis=1)
    np.testing.assert_allclose(distributions.unimix(padded, 0.01)[:, :5], vectors["unimix_out"], rtol=1e-12)
    four_rows = distributions.unimix(logits[:, :4], 0.01)
    np.testing.assert_allclose(four_rows, vectors["unimix_out_K4_C8"][:, :4], rtol=1e-12)


def test_binary_cross_entropy_golden(x64, vectors):
    loss = distributions.binary_cross_entropy(jnp.asarray(vectors["bce_logits"]), jnp.asarray(vectors["bce_labels"]))
    np.testing.assert_allclose(loss.mean(), vectors["bce"], rtol=1e-12)
    labels = jnp.asarray(vectors["bce_labels"], bool)
    np.testing.assert_array_equal(distributions.binary_cross_entropy(jnp.asarray(vectors["bce_logits"]), labels), loss)


def test_binary_cross_entropy_of_large_logits_is_finite():
    logits, labels = jnp.asarray([200.0, -200.0, 200.0]), jnp.asarray([1.0, 0.0, 0.0])
    np.testing.assert_allclose(distributions.binary_cross_entropy(logits, labels), [0.0, 0.0, 200.0], atol=1e-6)


def test_categorical_entropy_literal():
    logits = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(distributions.categorical_entropy(logits), [np.log(4), 0.0], rtol=1e-6, atol=1e-6)


def test_straight_through_is_exactly_one_hot_with_the_softmax_gradient(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(keys[0], (7, 4, 4), jnp.float64)
    gumbel = jax.random.gumbel(keys[1], logits.shape, jnp.float64)
    weights = jax.random.normal(keys[2], logits.shape, jnp.float64)

    def through(sampler):
        return jax.grad(lambda x: jnp.sum(weights * sampler(distributions.unimix(x, 0.01))))(logits)

    sample = distributions.straight_through(distributions.unimix(logits, 0.01), gumbel)
    chosen = np.argmax(np.asarray(distributions.unimix(logits, 0.01) + gumbel), axis=-1)
    np.testing.assert_array_equal(sample, np.eye(4)[chosen])
    expected = through(jnp.exp)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        through(lambda x: distributions.straight_through(x, gumbel)), expected, rtol=1e-10, atol=1e-15
    )


def test_straight_through_float32_never_falls_short_of_one():
    logits = 8 * jax.random.normal(jax.random.key(0), (512, 8, 8))
    gumbel = jax.random.gumbel(jax.random.key(1), logits.shape)
    sample = np.asarray(jax.jit(distributions.straight_through)(distributions.unimix(logits, 0.01), gumbel))
    assert set(np.unique(sample)) == {0.0, 1.0}


def test_sample_one_hot_follows_the_probabilities_and_has_no_gradient():
    probs = jnp.asarray([0.1, 0.2, 0.7])
    log_probs = jnp.broadcast_to(jnp.log(probs), (4000, 3))
    sample = distributions.sample_one_hot(jax.random.key(0), log_probs)
    np.testing.assert_array_equal(sample.sum(-1), 1.0)
    # Five standard errors of a frequency over 4000 draws.
    np.testing.assert_allclose(sample.mean(0), probs, atol=5 * 0.5 / 4000**0.5)
    gradient = jax.grad(lambda x: distributions.sample_one_hot(jax.random.key(0), x)[:, 0].sum())(log_probs)
    np.testing.assert_array_equal(gradient, 0.0)


@few
@hypothesis.given(hnp.arrays(np.float64, (8,), elements=st.floats(-4.8e8, 4.8e8)))
def test_two_hot_round_trip(values):
    with jax.enable_x64(True):
        weights = distributions.two_hot(jnp.asarray(values), BINS)
        rows, decoded = np.asarray(weights), np.asarray(distributions.two_hot_decode(jnp.log(weights)))
    np.testing.assert_allclose(rows.sum(-1), 1.0, rtol=1e-12)
    assert np.all(np.sum(rows > 0, axis=-1) <= 2)
    # The spacing of the float32 bins is off by up to 1e-6 of symlog, which symexp turns into that share of 1 + |x|.
    assert np.all(np.abs(decoded - values) <= 2e-6 * (1 + np.abs(values)))


@pytest.mark.parametrize(("value", "bin_index"), [(1e12, 254), (-1e12, 0), (np.inf, 254)])
def test_two_hot_clips_to_the_outermost_bins(value, bin_index):
    row = distributions.two_hot(jnp.asarray(value), BINS)
    np.testing.assert_allclose(row, np.eye(BINS)[bin_index], atol=1e-5)


def test_vmap_is_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    logits, other = jax.random.normal(keys[0], (3, 5, 4, 4)), jax.random.normal(keys[1], (3, 5, 4, 4))
    gumbel = jax.random.gumbel(keys[2], logits.shape)
    functions = (
        lambda a, b, g: distributions.straight_through(distributions.unimix(a, 0.01), g),
        lambda a, b, g: distributions.free_bits_kl(a, b, 0.1),
        lambda a, b, g: distributions.two_hot_loss(a, b[..., 0]),
    )
    for function in functions:
        batched = jax.vmap(function)(logits, other, gumbel)
        looped = [function(logits[i], other[i], gumbel[i]) for i in range(3)]
        chex.assert_trees_all_close(batched, jax.tree.map(lambda *x: jnp.stack(x), *looped), rtol=1e-6)
