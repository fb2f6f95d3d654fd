"""The tanh-Gaussian against closed forms and numerical integrals, its gradients, and what the actor learns with it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import distributions
from drama_jax.action_space import Continuous
from drama_jax.behaviour import actor_critic, networks, policies, ppo
from drama_jax.config import BehaviourConfig, Fidelity, OptimizerConfig

SMALL = BehaviourConfig(
    actor_layers=1,
    actor_units=8,
    critic_layers=1,
    critic_units=8,
    num_bins=15,
    compute_dtype="float32",
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=0, max_grad_norm=100.0),
)
MEANS = np.asarray([0.0, 0.3, -1.7, 4.9])
DEVIATIONS = np.asarray([1.0, 0.1, 0.5, 0.9])


def density(u, mean, deviation):
    """Of the Gaussian before the tanh."""
    return np.exp(-0.5 * ((u - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


def test_the_density_is_that_of_a_transformed_gaussian(x64):
    u = np.linspace(-6.5, 6.5, 27)
    actions = np.tanh(u)
    for mean, deviation in zip(MEANS, DEVIATIONS):
        given = (jnp.full((27, 1), value) for value in (mean, deviation))
        result = policies.tanh_gaussian_log_prob(*given, jnp.asarray(actions[:, None]))
        slope = 1 / np.cosh(u) ** 2
        exponent = -0.5 * ((u - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(result, exponent - np.log(slope), rtol=1e-8)


def test_the_density_of_several_entries_is_a_product_and_integrates_to_one(x64):
    edges = np.linspace(-1, 1, 20_001)
    actions = (edges[1:] + edges[:-1]) / 2
    mean, deviation = jnp.asarray([0.4]), jnp.asarray([0.6])
    one = jax.vmap(lambda a: policies.tanh_gaussian_log_prob(mean, deviation, a[None]))(jnp.asarray(actions))
    np.testing.assert_allclose(np.exp(one).sum() * (edges[1] - edges[0]), 1, rtol=1e-6)
    pair = policies.tanh_gaussian_log_prob(mean.repeat(2), deviation.repeat(2), jnp.asarray(actions[[5_000, 12_000]]))
    np.testing.assert_allclose(pair, one[5_000] + one[12_000], rtol=1e-12)


def test_the_entropy_is_that_of_the_squashed_action(x64):
    u = np.linspace(-20, 20, 400_001)
    for mean, deviation in zip(MEANS, DEVIATIONS):
        p = density(u, mean, deviation)
        log_p = -0.5 * ((u - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))
        log_slope = -2 * (np.logaddexp(u, -u) - np.log(2))
        expected = -np.sum(p * (log_p - log_slope)) * (u[1] - u[0])
        result = policies.tanh_gaussian_entropy(jnp.asarray([mean]), jnp.asarray([deviation]))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        assert result < np.log(2)  # that of uniform actions


def test_float32_is_as_good(x64):
    outputs = np.random.default_rng(0).normal(scale=4, size=(100, 6))
    actions = policies.sample(jax.random.key(0), jnp.asarray(outputs), continuous=True)

    @jax.jit
    def both(x):
        return policies.log_probs(x, actions, continuous=True), policies.entropy(x, continuous=True)

    for narrow, wide in zip(both(jnp.asarray(outputs, jnp.float32)), both(jnp.asarray(outputs))):
        assert narrow.dtype == jnp.float32 and wide.dtype == jnp.float64
        np.testing.assert_allclose(narrow, wide, rtol=2e-5, atol=2e-4)


def test_outputs_of_zero_are_a_wide_policy_and_none_is_too_large():
    mean, deviation = policies.gaussian(jnp.zeros(4))
    np.testing.assert_allclose(mean, 0)
    np.testing.assert_allclose(deviation, 0.1 + 0.9 / (1 + np.exp(-2)), rtol=1e-6)
    mean, deviation = policies.gaussian(jnp.asarray([-1e6, 1e6, -1e6, 1e6]))
    np.testing.assert_allclose(mean, [-5, 5])
    np.testing.assert_allclose(deviation, [0.1, 1.0], rtol=1e-6)
    outputs = jnp.asarray([1e6, 1e6])
    for sign in (-1.0, 1.0):
        log_prob, gradient = jax.value_and_grad(policies.log_probs)(outputs, jnp.asarray([sign]), continuous=True)
        assert np.isfinite(log_prob) and np.isfinite(gradient).all()


def test_samples_follow_the_density():
    outputs = jnp.broadcast_to(jnp.asarray([0.5, -2.0, 1.0, -3.0]), (50_000, 4))

    @jax.jit
    def draw(key):
        actions = policies.sample(key, outputs, continuous=True)
        estimate = -policies.log_probs(outputs, actions, continuous=True).mean()
        return actions, estimate, policies.entropy(outputs[0], continuous=True), policies.gaussian(outputs[0])

    actions, estimate, entropy, (mean, deviation) = draw(jax.random.key(1))
    assert actions.shape == (50_000, 2) and actions.dtype == jnp.float32
    assert np.abs(actions).max() < 1
    u = np.arctanh(np.asarray(actions, np.float64))
    np.testing.assert_allclose(u.mean(axis=0), mean, atol=5 * 1.0 / np.sqrt(50_000))
    np.testing.assert_allclose(u.std(axis=0), deviation, rtol=0.02)
    np.testing.assert_allclose(estimate, entropy, atol=0.03)
    np.testing.assert_allclose(policies.greedy(outputs[0], continuous=True), np.tanh(mean), rtol=1e-6)


def test_the_gradients_of_log_probability_and_entropy_are_those_of_finite_differences(x64):
    rng = np.random.default_rng(2)
    outputs, actions = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.uniform(-1, 1, (3, 2)))
    for function in (
        lambda x: policies.log_probs(x, actions, continuous=True).sum(),
        lambda x: policies.entropy(x, continuous=True).sum(),
    ):
        check_gradient(function, outputs)


def check_gradient(function, x, step=1e-5, rtol=1e-6):
    """Central differences in four random directions."""
    directions = jnp.asarray(np.random.default_rng(9).normal(size=(4, *x.shape)))

    @jax.jit
    def both(x, directions):
        points = jnp.concatenate([x + step * directions, x - step * directions])
        ahead, behind = jnp.split(jax.lax.map(function, points), 2)
        return jnp.sum(jax.grad(function)(x) * directions, axis=tuple(range(1, directions.ndim))), ahead - behind

    gradient, difference = both(x, directions)
    np.testing.assert_allclose(gradient, difference / (2 * step), rtol=rtol)
    assert np.abs(gradient).min() > 0


def rollouts(rng, batch=3, length=2, features=4, actions=2, dtype=jnp.float64):
    return (
        jnp.asarray(rng.normal(size=(batch, length + 1, features)), dtype),
        jnp.asarray(rng.uniform(-0.99, 0.99, (batch, length, actions)), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, length)), dtype),
        jnp.asarray(rng.random((batch, length)) < 0.2),
    )


def test_the_gradient_of_the_actor_loss_is_that_of_finite_differences(x64):
    config = BehaviourConfig(**{**SMALL.__dict__, "compute_dtype": "float64", "entropy_scale": 0.1})
    state = jax.jit(actor_critic.init, static_argnums=(1, 2, 3))(jax.random.key(0), config, 4, Continuous(2))
    assert state.params["actor"][networks.GAUSSIAN]["kernel"].shape == (8, 4)
    data = rollouts(np.random.default_rng(3))

    def loss(kernel):
        actor = {**state.params["actor"], networks.GAUSSIAN: {**state.params["actor"][networks.GAUSSIAN]}}
        actor[networks.GAUSSIAN]["kernel"] = kernel
        return actor_critic.loss(config, Fidelity(), {**state.params, "actor": actor}, state, *data)[0]

    kernel = jnp.asarray(np.random.default_rng(4).normal(size=(8, 4)))
    check_gradient(loss, kernel)

    @jax.jit
    def parts(params):
        total, terms = actor_critic.loss(config, Fidelity(), params, state, *data)
        values = (terms.values, terms.slow_values)
        returns, _, weights = actor_critic.targets(config, Fidelity(), *values, data[2], data[3])
        advantages = (returns - terms.values[:, :-1]) / jnp.maximum(1, terms.return_scale.spread)
        log_probs = policies.log_probs(terms.logits, data[1], continuous=True)
        entropy = policies.entropy(terms.logits, continuous=True)
        return total, terms, -jnp.mean(weights * log_probs * advantages), jnp.mean(weights * entropy)

    total, terms, policy_loss, entropy = parts(state.params)
    assert terms.logits.shape == (3, 2, 4)
    np.testing.assert_allclose(terms.policy_loss, policy_loss, rtol=1e-9)
    np.testing.assert_allclose(terms.entropy, entropy, rtol=1e-9)
    others = terms.policy_loss + terms.value_loss + terms.slow_value_loss
    np.testing.assert_allclose(total, others - 0.1 * terms.entropy, rtol=1e-9)


def test_the_actor_finds_the_action_that_pays():
    target = jnp.asarray([0.6, -0.3])

    def train(state, key):
        features = jnp.ones((256, 2, 4))
        outputs = actor_critic.policy_logits(SMALL, state.params, state.normaliser, features[:, :1])
        actions = policies.sample(key, outputs, continuous=True)
        rewards = -10 * jnp.square(actions - target).sum(axis=-1)
        over = jnp.ones((256, 1), bool)
        return actor_critic.update(SMALL, Fidelity(), state, features, actions, rewards, over)

    @jax.jit
    def run(key):
        init_key, key = jax.random.split(key)
        state = actor_critic.init(init_key, SMALL, 4, Continuous(2))
        state, metrics = jax.lax.scan(train, state, jax.random.split(key, 150))
        outputs = actor_critic.policy_logits(SMALL, state.params, state.normaliser, jnp.ones(4))
        return policies.greedy(outputs, continuous=True), metrics

    actions, metrics = run(jax.random.key(5))
    np.testing.assert_allclose(actions, target, atol=0.1)
    rewards, entropy = metrics["actor_critic/imagined_reward"], metrics["actor_critic/entropy"]
    assert rewards[-1] > rewards[0] / 4 and entropy[-1] < entropy[0] - 1


@pytest.mark.parametrize("minibatch_size", [4, 6])
def test_ppo_takes_them_in_minibatches_or_at_once(minibatch_size):
    config = dataclasses.replace(SMALL, name="ppo", minibatch_size=minibatch_size)

    def update(key):
        state = actor_critic.init(key, config, 4, Continuous(2))
        data = rollouts(np.random.default_rng(3), dtype=jnp.float32)
        after, metrics = ppo.update(config, Fidelity(), state, *data, key)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        return metrics

    metrics = jax.eval_shape(update, jax.random.key(0))
    assert all(metric.shape == () for metric in metrics.values())


def test_discrete_actions_are_what_they_were():
    rng = np.random.default_rng(6)
    logits, actions = jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.float32), jnp.asarray([[0, 4], [2, 2], [1, 3]])
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(actions)[..., None], axis=-1)
    np.testing.assert_array_equal(policies.log_probs(logits, actions, continuous=False), chosen[..., 0])
    np.testing.assert_array_equal(policies.entropy(logits, continuous=False), distributions.categorical_entropy(logits))
    key = jax.random.key(7)
    np.testing.assert_array_equal(policies.sample(key, logits, continuous=False), jax.random.categorical(key, logits))
    state = jax.eval_shape(lambda key: actor_critic.init(key, SMALL, 4, 5), key)
    assert set(state.params["actor"]) == {"hidden_0", "norm_0", "output"}
