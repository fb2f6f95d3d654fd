"""Behaviour update: three updates of the released code, literal cases, vmap == loop."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import optim
from drama_jax.behaviour import actor_critic, normalisers, torch_names
from drama_jax.config import BehaviourConfig, Fidelity, OptimizerConfig

PAPER = Fidelity()
RELEASED = Fidelity(
    reset_at_episode_start=False,
    reward_follows_action=False,
    bootstrap_next_value=False,
    weight_by_survival=False,
    normalise_by_training_data=False,
    first_action_from_policy=False,
)
GOLDEN = BehaviourConfig(actor_units=32, critic_units=48)
TINY = BehaviourConfig(
    actor_layers=1,
    actor_units=8,
    critic_layers=1,
    critic_units=8,
    num_bins=15,
    compute_dtype="float32",
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=0, max_grad_norm=100.0),
)

# Compiled once for all tests: configuration and fidelity are static.
init = jax.jit(actor_critic.init, static_argnums=(1, 2, 3))
update = jax.jit(actor_critic.update, static_argnums=(0, 1))
differentiate = jax.jit(jax.value_and_grad(actor_critic.loss, argnums=2, has_aux=True), static_argnums=(0, 1))


def _config(dtype):
    return BehaviourConfig(**{**GOLDEN.__dict__, "compute_dtype": dtype})


def _networks(vectors, prefix, dtype, names=("actor", "critic", "slow_critic")):
    trees = {}
    for name in names:
        start = f"{prefix}{name}."
        arrays = {key.removeprefix(start): value for key, value in vectors.items() if key.startswith(start)}
        trees[name] = torch_names.from_torch(arrays)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), trees)


def _initial(vectors, config, dtype):
    params = _networks(vectors, "param0/", dtype)
    state = actor_critic.BehaviourState(
        slow_critic=params.pop("slow_critic"),
        params=params,
        opt_state=optim.make_optimizer(config.optimizer).init(params),
        normaliser=normalisers.init_input(128, dtype),
        return_scale=normalisers.init_return_scale(dtype),
    )
    fresh = jax.eval_shape(lambda key: actor_critic.init(key, config, 128, 5), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
    return state


def _batch(vectors, step, dtype):
    data = {name: vectors[f"data{step}/{name}"] for name in ("latent", "action", "reward", "termination")}
    return (
        jnp.asarray(data["latent"], dtype),
        jnp.asarray(data["action"], jnp.int32),
        jnp.asarray(data["reward"], dtype),
        jnp.asarray(data["termination"]),
    )


def _check_normaliser(normaliser, vectors, prefix, **tolerance):
    for name, value in (("mean", normaliser.mean), ("var", normaliser.variance), ("count", normaliser.count)):
        np.testing.assert_allclose(value, vectors[f"{prefix}/{name}"], **tolerance)


def _check_terms(total, terms, vectors, prefix, **tolerance):
    stored = {
        "log/policy_loss": terms.policy_loss,
        "log/value_loss": terms.value_loss,
        "slow_value_loss": terms.slow_value_loss,
        "log/entropy_loss": -terms.entropy,
        "log/S": terms.return_scale.spread,
        "log/norm_ratio": jnp.maximum(1.0, terms.return_scale.spread),
        "log/total_loss": total,
        "lower_ema": terms.return_scale.lower,
        "upper_ema": terms.return_scale.upper,
        "slow_lambda_return": terms.slow_returns,
        "slow_value": terms.slow_values,
        "lambda_return": terms.returns,
        "value": terms.values,
    }
    for name, value in stored.items():
        np.testing.assert_allclose(value, vectors[f"{prefix}/{name}"], err_msg=name, **tolerance)
    np.testing.assert_allclose(terms.logits, vectors[f"{prefix}/logits"][:, :-1], err_msg="logits", **tolerance)


def _check_trees(actual, stored, rtol):
    """Stored arrays are float32: an error of rtol of each array's largest entry."""

    def check(path, a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))

    chex.assert_trees_all_equal_shapes(actual, stored)
    jax.tree_util.tree_map_with_path(check, actual, stored)


def test_three_updates_golden(x64, golden):
    vectors, config = golden("agent_update_old"), _config("float64")
    state = _initial(vectors, config, jnp.float64)
    start = {**state.params, "slow_critic": state.slow_critic}

    @jax.jit
    def step(state, batch):
        # The released code moves the input statistics when it samples actions, too.
        before = state.replace(normaliser=normalisers.update(state.normaliser, batch[0][:, :-1]))
        sampled = actor_critic.policy_logits(config, before.params, before.normaliser, batch[0][:, :-1])
        moved = before.replace(normaliser=normalisers.update(before.normaliser, batch[0]))
        logits = actor_critic.policy_logits(config, moved.params, moved.normaliser, batch[0])
        raw_values = actor_critic.value_logits(config, moved.params["critic"], batch[0])
        losses = differentiate.__wrapped__(config, RELEASED, moved.params, moved, *batch)
        result = actor_critic.update(config, RELEASED, before, *batch)
        return before.normaliser, sampled, logits, raw_values, losses, result

    for number in (1, 2, 3):
        prefix = f"step{number}"
        normaliser, sampled, logits, raw_values, ((total, terms), gradients), (state, metrics) = step(
            state, _batch(vectors, number, jnp.float64)
        )
        # After an update both sides differ by the float64 rounding of a sign-like step: 1e-10 of the logits.
        tolerance = {"rtol": 1e-8, "atol": 1e-10}
        _check_normaliser(normaliser, vectors, f"{prefix}/norm_before", rtol=1e-11, atol=1e-13)
        # The released code normalises the logits that it samples from.
        np.testing.assert_allclose(jax.nn.log_softmax(sampled), vectors[f"{prefix}/old_logits"], **tolerance)
        np.testing.assert_allclose(logits, vectors[f"{prefix}/logits"], **tolerance)
        if number == 1:
            _check_trees(raw_values, vectors["step1/raw_value"], rtol=1e-7)
        _check_terms(total, terms, vectors, prefix, **tolerance)
        _check_trees(gradients, _networks(vectors, f"{prefix}/grad/", jnp.float64, ("actor", "critic")), rtol=2e-7)

        np.testing.assert_allclose(metrics["actor_critic/grad_norm"], vectors[f"{prefix}/grad_norm"], rtol=1e-8)
        np.testing.assert_allclose(metrics["actor_critic/total_loss"], total, rtol=1e-12)
        _check_normaliser(state.normaliser, vectors, f"{prefix}/norm_after", rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(state.return_scale.upper, vectors[f"{prefix}/upper_ema"], rtol=1e-8)
        end = {**state.params, "slow_critic": state.slow_critic}
        delta = jax.tree.map(jnp.subtract, end, start)
        # LaProp divides by the gradient's own size: where gradients nearly vanish, their rounding shows in the delta.
        _check_trees(delta, _networks(vectors, f"{prefix}/delta/", jnp.float64), rtol=1e-6)


def test_loss_float32_golden(golden):
    vectors, config = golden("agent_update_old"), _config("float32")
    state = _initial(vectors, config, jnp.float32)
    normaliser = normalisers.update(state.normaliser, jnp.asarray(vectors["data1/latent"])[:, :-1])
    _check_normaliser(normaliser, vectors, "step1/norm_before", rtol=1e-5, atol=1e-6)
    batch = _batch(vectors, 1, jnp.float32)
    state = state.replace(normaliser=normalisers.update(normaliser, batch[0]))
    (total, terms), gradients = differentiate(config, RELEASED, state.params, state, *batch)
    _check_terms(total, terms, vectors, "step1", rtol=1e-5, atol=1e-5)
    _check_trees(gradients, _networks(vectors, "step1/grad/", jnp.float32, ("actor", "critic")), rtol=2e-5)


def test_optimizer_float32_golden(golden):
    """Stored gradients in, parameter changes out: with gradients of our own, LaProp would amplify their rounding."""
    vectors = golden("agent_update_old")
    optimizer = optim.make_optimizer(GOLDEN.optimizer)
    params = _networks(vectors, "param0/", jnp.float32, ("actor", "critic"))
    opt_state, delta = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    for step in (1, 2, 3):
        gradients = _networks(vectors, f"step{step}/grad/", jnp.float32, ("actor", "critic"))
        steps, opt_state = update(gradients, opt_state, params)
        delta = jax.tree.map(jnp.add, delta, steps)
        np.testing.assert_allclose(optim.gradient_norm(opt_state), vectors[f"step{step}/grad_norm"], rtol=1e-6)
        _check_trees(delta, _networks(vectors, f"step{step}/delta/", jnp.float32, ("actor", "critic")), rtol=2e-6)


@functools.partial(jax.jit, static_argnames=("rollouts",))
def _tiny_batch(key, rollouts=32, horizon=5, features=6, actions=3):
    keys = jax.random.split(key, 4)
    return (
        jax.random.normal(keys[0], (rollouts, horizon + 1, features)),
        jax.random.randint(keys[1], (rollouts, horizon), 0, actions),
        jax.random.normal(keys[2], (rollouts, horizon)),
        jax.random.bernoulli(keys[3], 0.2, (rollouts, horizon)),
    )


def test_steps_after_a_termination_do_not_count():
    state = init(jax.random.key(0), TINY, 6, 3)
    features, actions, rewards, _ = _tiny_batch(jax.random.key(1), rollouts=2)
    terminations = jnp.zeros(rewards.shape, bool).at[0, 1].set(True).at[1, 0].set(True)
    weights = np.asarray([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])

    def gradient(fidelity, rewards, actions):
        batch = (features, actions, rewards, terminations)
        (_, terms), gradients = differentiate(TINY, fidelity, state.params, state, *batch)
        return terms, gradients

    terms, before = gradient(PAPER, rewards, actions)
    entropies = -np.sum(np.asarray(jax.nn.softmax(terms.logits) * jax.nn.log_softmax(terms.logits)), axis=-1)
    np.testing.assert_allclose(terms.entropy, np.sum(weights * entropies) / 10, rtol=1e-6)
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(terms.logits)), np.asarray(actions)[..., None], -1)
    advantages = np.asarray(terms.returns - terms.values[:, :-1])
    np.testing.assert_allclose(terms.policy_loss, -np.sum(weights * log_probs[..., 0] * advantages) / 10, rtol=1e-5)

    # Dead steps may hold anything; the return scale sees them, but their spread stays below 1 here.
    dead = jnp.asarray(weights == 0)
    other = (jnp.where(dead, rewards + 0.1, rewards), jnp.where(dead, 2 - actions, actions))
    _, after = gradient(PAPER, *other)
    chex.assert_trees_all_close(before, after, rtol=1e-6, atol=1e-8)
    released = [gradient(RELEASED, *arrays)[1] for arrays in ((rewards, actions), other)]
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(*released, rtol=1e-3, atol=1e-5)


def _override(state, batch, learning_rate, entropy_scale):
    return actor_critic.update(TINY, PAPER, state, *batch, learning_rate=learning_rate, entropy_scale=entropy_scale)


alone = jax.jit(_override)


def test_update_vmaps_over_seeds_and_overrides():
    keys = jax.random.split(jax.random.key(0), 3)
    overrides = (jnp.asarray([1e-3, 1e-2, 1e-2]), jnp.asarray([0.0, 0.0, 0.3]))
    batches = jax.jit(jax.vmap(_tiny_batch.__wrapped__))(keys)
    singles = [init(key, TINY, 6, 3) for key in keys]
    states = jax.tree.map(lambda *x: jnp.stack(x), *singles)
    batched = jax.jit(jax.vmap(_override))
    for _ in range(2):
        states, metrics = batched(states, batches, *overrides)
        for i, single in enumerate(singles):
            row = functools.partial(jax.tree.map, operator.itemgetter(i))
            singles[i], expected = alone(single, *row((batches, *overrides)))
            # The kernels of a batch and of one sum in different orders.
            chex.assert_trees_all_close(row((states, metrics)), (singles[i], expected), rtol=2e-4, atol=2e-6)


def test_overrides_equal_the_configuration():
    state = init(jax.random.key(0), TINY, 6, 3)
    batch = _tiny_batch(jax.random.key(1))
    expected = update(TINY, PAPER, state, *batch)
    actual = alone(state, batch, jnp.asarray(1e-2), jnp.asarray(3e-4))

    def close(actual, expected):
        # Of an array's scale: two programs round a gradient that cancels out, and its square, differently.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    jax.tree.map(close, actual, expected)


def test_update_learns_a_bandit():
    """Reward 1 for action 0 only: the policy comes to prefer it, the critic to expect it."""
    state = init(jax.random.key(0), TINY, 6, 3)
    for key in jax.random.split(jax.random.key(1), 60):
        features, actions, rewards, _ = _tiny_batch(key)
        rewards = (actions == 0).astype(rewards.dtype)
        state, metrics = update(TINY, PAPER, state, features, actions, rewards, jnp.ones(actions.shape, bool))
    features = jax.random.normal(jax.random.key(2), (64, 6))
    probs = jax.nn.softmax(actor_critic.policy_logits(TINY, state.params, state.normaliser, features))
    assert probs[:, 0].mean() > 0.8
    assert 0.1 < metrics["actor_critic/imagined_value"] < 0.7
    assert metrics["actor_critic/imagined_termination"] == 1
    # Rewards of 0 and 1, of which at least 0.8 are 1.
    assert 0 < metrics["actor_critic/advantage"] < 0.6


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state():
    config = BehaviourConfig(**{**TINY.__dict__, "compute_dtype": "bfloat16"})
    state = init(jax.random.key(0), TINY, 6, 3)
    batch = _tiny_batch(jax.random.key(1))
    features = batch[0].astype(jnp.bfloat16)
    new, metrics = update(config, PAPER, state, features, *batch[1:])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite(metrics)
    full, _ = update(TINY, PAPER, state, *batch)
    np.testing.assert_allclose(new.normaliser.mean, full.normaliser.mean, atol=5e-3)
    logits = actor_critic.policy_logits(config, state.params, state.normaliser, features)
    assert logits.dtype == jnp.float32
    reference = actor_critic.policy_logits(TINY, state.params, state.normaliser, batch[0])
    assert np.abs(logits - reference).max() > 0
    np.testing.assert_allclose(logits, reference, atol=2e-2 * np.abs(reference).max())
