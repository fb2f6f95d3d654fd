"""LaProp against golden trajectories, its edge cases, and the clip."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drama_jax import optim
from drama_jax.config import OptimizerConfig

# tag -> (learning rate, warm-up updates, LaProp keywords), as the golden file's readme states them.
CASES = {
    "const": (1e-2, 0, {}),
    "warm": (1e-2, 8, {"weight_decay": 1e-4}),
    "eps": (1e-2, 0, {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 1e-2}),
    "world_model": (4e-5, 1000, {}),
}


def _trajectory(transformation, gradient, x, steps):
    def step(carry, _):
        x, state = carry
        updates, state = transformation.update(gradient(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.lax.scan(step, (x, transformation.init(x)), length=steps)[1]


def _quadratic(vectors, dtype):
    curvature, target = jnp.asarray(vectors["a"], dtype), jnp.asarray(vectors["xt"], dtype)
    return lambda x: curvature * (x - target)


@pytest.mark.parametrize("tag", CASES)
def test_laprop_golden(x64, golden, tag):
    vectors = golden("laprop")
    rate, warmup, keywords = CASES[tag]
    schedule = optim.warmup(rate, warmup)
    counts = jnp.arange(20, dtype=jnp.int32)
    np.testing.assert_allclose(jax.vmap(schedule)(counts), vectors[f"{tag}/lrs"], rtol=1e-14)
    x = _trajectory(optim.laprop(schedule, **keywords), _quadratic(vectors, jnp.float64), vectors["x0"], 20)
    np.testing.assert_allclose(x, vectors[f"{tag}/traj"], rtol=1e-12)
    if not keywords.get("weight_decay"):
        np.testing.assert_array_equal(x[:, 3], vectors["x0"][3])


@pytest.mark.parametrize("tag", CASES)
def test_laprop_float32_golden(golden, tag):
    vectors = golden("laprop")
    rate, warmup, keywords = CASES[tag]
    x0 = jnp.asarray(vectors["x0"], jnp.float32)
    transformation = optim.laprop(optim.warmup(rate, warmup), **keywords)
    x = _trajectory(transformation, _quadratic(vectors, jnp.float32), x0, 20)
    # Twenty roundings of a parameter of size <= 2.
    np.testing.assert_allclose(x, vectors[f"{tag}/traj"], rtol=2e-6, atol=2e-6)


def test_zero_gradients_do_not_move_a_parameter_and_tiny_ones_do_not_throw_it():
    transformation = optim.laprop(1e-2)
    gradient = lambda x: jnp.asarray([0.0, 1e-25, -1e-12], jnp.float32)  # noqa: E731
    x = _trajectory(transformation, gradient, jnp.ones(3), 3)
    np.testing.assert_array_equal(x[:, :2], 1.0)
    # m starts at 0, but E does too: the very first step has full size, lr * sign(g).
    np.testing.assert_allclose(x[:, 2], [1.01, 1.02, 1.03], rtol=1e-6)


def test_zero_learning_rate_is_no_step():
    x = _trajectory(optim.laprop(0.0), lambda x: x, jnp.ones(2), 2)
    np.testing.assert_array_equal(x, 1.0)


def test_laprop_vmaps_over_learning_rates(golden):
    vectors = golden("laprop")
    rates = jnp.asarray([1e-3, 1e-2, 5e-2])
    x0 = jnp.asarray(vectors["x0"], jnp.float32)

    def run(rate):
        return _trajectory(optim.laprop(rate), _quadratic(vectors, jnp.float32), x0, 5)

    batched = jax.vmap(run)(rates)
    np.testing.assert_allclose(batched, jnp.stack([run(float(rate)) for rate in rates]), rtol=1e-6)
    assert np.ptp(batched[:, -1, 0]) > 0.05


def test_laprop_rejects_bad_settings():
    with pytest.raises(ValueError, match="b2=1"):
        optim.laprop(1e-2, b2=1.0)
    transformation = optim.laprop(1e-2, weight_decay=0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        transformation.update(jnp.ones(2), transformation.init(jnp.ones(2)))


@pytest.mark.parametrize(("max_norm", "scale"), [(10.0, 1.0), (2.5, 2.5 / (5 + 1e-6))])
def test_clip_by_global_norm_literal(x64, max_norm, scale):
    gradients = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    clip = optim.clip_by_global_norm(max_norm)
    clipped, state = clip.update(gradients, clip.init(gradients))
    chex.assert_trees_all_close(clipped, jax.tree.map(lambda g: scale * g, gradients), rtol=1e-14)
    np.testing.assert_allclose(state.norm, 5.0, rtol=1e-14)


def test_make_optimizer_is_the_chain_on_every_array(x64):
    config = OptimizerConfig(learning_rate=1e-2, warmup_updates=3, max_grad_norm=0.5, weight_decay=1e-3)
    flat = optim.make_optimizer(config)
    plain = optax.chain(optim.clip_by_global_norm(0.5), optim.laprop(optim.warmup(1e-2, 3), weight_decay=1e-3))
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.arange(2.0), "s": jnp.ones(())}
    states = [flat.init(params), plain.init(params)]
    results = [params, params]
    for step in range(4):
        gradients = {name: jnp.cos(3 * x + step) for name, x in params.items()}
        for i, transformation in enumerate((flat, plain)):
            updates, states[i] = transformation.update(gradients, states[i], results[i])
            results[i] = optax.apply_updates(results[i], updates)
        np.testing.assert_allclose(optim.gradient_norm(states[0]), optax.tree.norm(gradients), rtol=1e-12)
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-12)


def test_optimizer_state_does_not_depend_on_the_learning_rate():
    config, params = OptimizerConfig(), {"w": jnp.ones((2, 2))}
    fixed = optim.make_optimizer(config).init(params)
    traced = jax.jit(lambda rate: optim.make_optimizer(config, rate).init(params))(jnp.asarray(0.1))
    chex.assert_trees_all_equal(fixed, traced)


def test_warmup_counts_updates_from_one():
    schedule = optim.warmup(2.0, 4)
    rates = [float(schedule(jnp.asarray(count))) for count in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert float(optim.warmup(2.0, 0)(jnp.asarray(0))) == 2.0
