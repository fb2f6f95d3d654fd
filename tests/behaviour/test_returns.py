"""Lambda-returns against a plain loop, and survival."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.behaviour import returns

HORIZON = 7
finite = st.floats(-100, 100)
few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)

lambda_returns = jax.jit(returns.lambda_returns, static_argnames=("discount", "lambda_", "bootstrap_next_value"))


def _loop(rewards, values, continues, discount, lambda_, bootstrap_next_value):
    result, following = np.zeros_like(rewards), values[-1]
    for t in reversed(range(len(rewards))):
        bootstrap = values[t + 1] if bootstrap_next_value else values[t]
        following = rewards[t] + discount * continues[t] * ((1 - lambda_) * bootstrap + lambda_ * following)
        result[t] = following
    return result


@few
@hypothesis.given(
    rewards=hnp.arrays(np.float64, (HORIZON,), elements=finite),
    values=hnp.arrays(np.float64, (HORIZON + 1,), elements=finite),
    continues=hnp.arrays(np.float64, (HORIZON,), elements=st.sampled_from([0.0, 1.0])),
    discount=st.sampled_from([0.0, 0.985, 1.0]),
    lambda_=st.sampled_from([0.0, 0.95, 1.0]),
    bootstrap_next_value=st.booleans(),
)
def test_lambda_returns_equal_a_plain_loop(rewards, values, continues, discount, lambda_, bootstrap_next_value):
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x) for x in (rewards, values, continues))
        result = np.asarray(lambda_returns(*arrays, discount, lambda_, bootstrap_next_value=bootstrap_next_value))
    expected = _loop(rewards, values, continues, discount, lambda_, bootstrap_next_value)
    np.testing.assert_allclose(result, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("bootstrap_next_value", "expected"),
    [(True, [1 + 0.5 * (0.25 * 20 + 0.75 * 17.0), 2 + 0.5 * 30.0]), (False, [1 + 0.5 * (2.5 + 0.75 * 15.75), 15.75])],
)
def test_lambda_returns_literal(bootstrap_next_value, expected):
    rewards, values = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[10.0, 20.0, 30.0]])
    result = lambda_returns(rewards, values, jnp.ones((1, 2)), 0.5, 0.75, bootstrap_next_value=bootstrap_next_value)
    np.testing.assert_allclose(result, [expected], rtol=1e-6)


@pytest.mark.parametrize("horizon", [1, 16])
def test_rows_are_independent(horizon):
    keys = jax.random.split(jax.random.key(0), 3)
    rewards = jax.random.normal(keys[0], (3, 4, horizon))
    values = jax.random.normal(keys[1], (3, 4, horizon + 1))
    continues = jax.random.bernoulli(keys[2], 0.8, rewards.shape).astype(jnp.float32)
    whole = lambda_returns(rewards, values, continues, 0.9, 0.8)
    single = jax.vmap(jax.vmap(lambda r, v, c: lambda_returns(r, v, c, 0.9, 0.8)))(rewards, values, continues)
    np.testing.assert_allclose(whole, single, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_first_return(x64):
    keys = jax.random.split(jax.random.key(0), 2)
    rewards, values = jax.random.normal(keys[0], (5,)), jax.random.normal(keys[1], (6,))
    continues = jnp.asarray([1.0, 1.0, 1.0, 0.0, 1.0])

    def first(rewards, values):
        return lambda_returns(rewards, values, continues, 0.9, 0.8)[0]

    by_rewards, by_values = jax.grad(first, argnums=(0, 1))(rewards, values)
    decay = 0.9 * 0.8
    np.testing.assert_allclose(by_rewards, [1, decay, decay**2, decay**3, 0], rtol=1e-12)
    step = 0.9 * 0.2
    np.testing.assert_allclose(by_values, [0, step, step * decay, step * decay**2, 0, 0], rtol=1e-12)


def test_mismatched_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"values must be float \[5\], got float32 \[4\]"):
        lambda_returns(jnp.ones(4), jnp.ones(4), jnp.ones(4), 0.9, 0.8)


def test_survival_literal():
    continues = jnp.asarray([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    expected = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(returns.survival(continues), expected)
