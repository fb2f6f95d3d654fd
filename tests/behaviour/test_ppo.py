"""PPO: three updates of the released code, the clipped loss, minibatches, learning."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import optim
from drama_jax.behaviour import actor_critic, networks, normalisers, ppo, torch_names
from drama_jax.config import BehaviourConfig, Fidelity, OptimizerConfig
from tests.tools import assert_trees_close

RELEASED = Fidelity(bootstrap_next_value=False, weight_by_survival=False, gradient_through_clip=False)
GOLDEN = BehaviourConfig(
    name="ppo", actor_units=32, critic_units=48, epochs=3, minibatch_size=32, compute_dtype="float64"
)
TINY = BehaviourConfig(
    name="ppo",
    actor_layers=1,
    actor_units=8,
    critic_layers=1,
    critic_units=8,
    num_bins=15,
    compute_dtype="float32",
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=0, max_grad_norm=100.0),
    minibatch_size=48,
)


def trees(vectors, prefix, names=("actor", "critic", "slow_critic")):
    """The networks' arrays; the released state dict has a spread for continuous actions, which has no part here."""
    found = {}
    for name in names:
        start = f"{prefix}{name}."
        arrays = {key.removeprefix(start): vectors[key] for key in vectors if key.startswith(start)}
        # Named as in the newer tree, `weight`, where the older one has `scale`.
        norms = {key for key, value in arrays.items() if key.endswith(".weight") and value.ndim == 1}
        found[name] = torch_names.from_torch(
            {key.replace(".weight", ".scale") if key in norms else key: value for key, value in arrays.items()}
        )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), found)


def check_normaliser(normaliser, vectors, prefix):
    for name, value in (("mean", normaliser.mean), ("var", normaliser.variance), ("count", normaliser.count)):
        np.testing.assert_allclose(value, vectors[f"{prefix}/{name}"], rtol=1e-9, atol=1e-11)


def test_three_updates_match_released_code(golden, x64, monkeypatch):
    """Every minibatch's losses and gradient norm, every epoch's returns, and the parameters, in float64."""
    monkeypatch.setattr(networks, "EPSILON", 1e-5)  # the newer tree's norms
    vectors = golden("ppo_update_new")
    params = trees(vectors, "param0/")
    slow_critic = params.pop("slow_critic")
    state = actor_critic.BehaviourState(
        params=params,
        slow_critic=slow_critic,
        opt_state=optim.make_optimizer(GOLDEN.optimizer).init(params),
        normaliser=normalisers.init_input(128, jnp.float64),
        return_scale=normalisers.init_return_scale(jnp.float64),
    )
    start = {**params, "slow_critic": slow_critic}

    @jax.jit
    def update(state, batch, order):
        # The released code moves the input statistics when it chooses actions, too.
        before = state.replace(normaliser=normalisers.update(state.normaliser, batch[0][:, :-1]))
        logits = actor_critic.policy_logits(GOLDEN, before.params, before.normaliser, batch[0][:, :-1])
        return before.normaliser, logits, ppo.update_in_order(GOLDEN, RELEASED, before, *batch, order)

    for number in (1, 2, 3):
        prefix = f"step{number}"
        data = {name: vectors[f"data{number}/{name}"] for name in ("latent", "action", "reward", "termination")}
        batch = (
            jnp.asarray(data["latent"], jnp.float64),
            jnp.asarray(data["action"], jnp.int32),
            jnp.asarray(data["reward"], jnp.float64),
            jnp.asarray(data["termination"]),
        )
        before, logits, (state, steps, epochs) = update(state, batch, jnp.asarray(vectors[f"{prefix}/minibatch_order"]))
        check_normaliser(before, vectors, f"{prefix}/norm_before")
        # After an update both sides differ by the float64 rounding of a sign-like step.
        tolerance = {"rtol": 1e-8, "atol": 1e-10}
        np.testing.assert_allclose(logits, vectors[f"{prefix}/old_logits"], **tolerance)
        for column, name in enumerate(("policy_loss", "value_loss", "slow_value_loss", "entropy", "kl")):
            expected = vectors[f"{prefix}/minibatch_losses"][:, column]
            np.testing.assert_allclose(getattr(steps, name), expected, err_msg=name, **tolerance)
        np.testing.assert_allclose(steps.grad_norm, vectors[f"{prefix}/minibatch_grad_norm"], rtol=1e-8)
        np.testing.assert_allclose(steps.total_loss.mean(), vectors[f"{prefix}/log/total_loss"], rtol=1e-8)
        for epoch in range(3):
            for name, value in (
                ("value", epochs.values),
                ("lambda_return", epochs.returns),
                ("slow_lambda_return", epochs.slow_returns),
            ):
                np.testing.assert_allclose(value[epoch], vectors[f"{prefix}/epoch{epoch}/{name}"], **tolerance)
        np.testing.assert_allclose(state.return_scale.lower, vectors[f"{prefix}/lower_ema"], rtol=1e-8)
        np.testing.assert_allclose(state.return_scale.upper, vectors[f"{prefix}/upper_ema"], rtol=1e-8)
        check_normaliser(state.normaliser, vectors, f"{prefix}/norm_after")
        if number != 2:
            delta = jax.tree.map(jnp.subtract, {**state.params, "slow_critic": state.slow_critic}, start)
            # LaProp divides by the gradient's own size: where gradients nearly vanish, their rounding shows.
            assert_trees_close(delta, trees(vectors, f"{prefix}/delta/"), rtol=1e-6)


def test_the_first_gradient_matches_released_code(golden, x64, monkeypatch):
    monkeypatch.setattr(networks, "EPSILON", 1e-5)
    vectors = golden("ppo_update_new")
    params = trees(vectors, "param0/")
    del params["slow_critic"]
    chosen = vectors["step1/minibatch_order"][0, :32]
    rows = jnp.asarray(vectors["data1/latent"][:, :-1].reshape(54, -1)[chosen], jnp.float64)
    before = normalisers.InputNormaliser(
        *(jnp.asarray(vectors[f"step1/norm_before/{name}"], jnp.float64) for name in ("mean", "var", "count"))
    )
    values, returns, slow_returns = (
        jnp.asarray(vectors[f"step1/epoch0/{name}"], jnp.float64)
        for name in ("value", "lambda_return", "slow_lambda_return")
    )
    actions = jnp.asarray(vectors["data1/action"].reshape(-1)[chosen], jnp.int32)
    old_logits = jnp.asarray(vectors["step1/old_logits"].reshape(54, 5)[chosen], jnp.float64)

    def pick(array):
        return jnp.asarray(np.asarray(array).reshape(54)[chosen], jnp.float64)

    part = ppo.Rows(
        features=rows,
        actions=actions,
        old_log_probs=actor_critic.action_log_probs(old_logits, actions),
        advantages=pick(returns - values[:, :-1]),  # returns are spread by less than 1 here
        returns=pick(returns),
        slow_returns=pick(slow_returns),
        weights=jnp.ones(32),
    )
    gradient = jax.jit(
        jax.grad(lambda params: ppo.loss(GOLDEN, RELEASED, params, normalisers.update(before, rows), part)[0])
    )
    expected = trees(vectors, "step1/grad_first_minibatch/", ("actor", "critic"))
    assert_trees_close(gradient(params), expected, rtol=1e-6)


@functools.partial(jax.jit, static_argnames="rollouts")
def batch(key, rollouts=32, horizon=5, features=6, actions=3):
    keys = jax.random.split(key, 4)
    return (
        jax.random.normal(keys[0], (rollouts, horizon + 1, features)),
        jax.random.randint(keys[1], (rollouts, horizon), 0, actions),
        jax.random.normal(keys[2], (rollouts, horizon)),
        jax.random.bernoulli(keys[3], 0.2, (rollouts, horizon)),
    )


init = jax.jit(actor_critic.init, static_argnums=(1, 2, 3))
update = jax.jit(ppo.update, static_argnums=(0, 1))


def test_what_the_clipped_loss_rewards():
    """No gradient where the ratio has gone beyond the clip in the direction that pays; else that of the ratio."""
    state = init(jax.random.key(0), TINY, 6, 3)
    rows = ppo.Rows(
        features=jnp.ones((1, 6)),
        actions=jnp.zeros((1,), jnp.int32),
        old_log_probs=jnp.zeros((1,)),
        advantages=jnp.ones((1,)),
        returns=jnp.zeros((1,)),
        slow_returns=jnp.zeros((1,)),
        weights=jnp.ones((1,)),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def run(fidelity, ratio, advantage):
        now = actor_critic.policy_logits(TINY, state.params, state.normaliser, rows.features)
        old = jax.nn.log_softmax(now)[:, 0] - jnp.log(ratio)

        def policy_loss(params):
            changed = dataclasses.replace(rows, old_log_probs=old, advantages=advantage[None])
            return ppo.loss(TINY, fidelity, params, state.normaliser, changed)[1]["policy_loss"]

        value, gradient = jax.value_and_grad(policy_loss)(state.params)
        # The logit of the action that was taken moves its log-probability by 1 - p.
        return value, gradient["actor"]["output"]["bias"][0] / (1 - jax.nn.softmax(now)[0, 0])

    for ratio, advantage, expected, share in (
        (1.0, 2.0, -2.0, 0.5),
        (1.1, 2.0, -2.2, 0.5),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, 1.0),
        (1.5, -2.0, 3.0, 1.0),
        (0.5, -2.0, 1.6, 0.0),
    ):
        for fidelity, left in ((Fidelity(), float(share > 0)), (RELEASED, share)):
            value, slope = run(fidelity, jnp.asarray(ratio), jnp.asarray(advantage))
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            np.testing.assert_allclose(slope, -left * ratio * advantage, rtol=1e-4)


def test_minibatches_cover_all_rows_once_an_epoch():
    """160 rows in minibatches of 48, 48, 48 and 16; the state is one that `actor_critic` continues."""
    state = init(jax.random.key(0), TINY, 6, 3)
    rollouts = batch(jax.random.key(1))
    new, metrics = update(TINY, Fidelity(), state, *rollouts, jax.random.key(2))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite((new, metrics))
    assert new.normaliser.count == pytest.approx(3 * 160 + 1e-4)
    np.testing.assert_allclose(new.normaliser.mean, rollouts[0][:, :-1].mean((0, 1)), atol=1e-5)
    (laprop,) = [
        part
        for part in jax.tree.leaves(new.opt_state, is_leaf=lambda x: isinstance(x, optim.LaPropState))
        if isinstance(part, optim.LaPropState)
    ]
    assert laprop.num_updates == 3 * math.ceil(160 / 48)
    other, _ = update(TINY, Fidelity(), state, *rollouts, jax.random.key(3))
    assert not np.array_equal(other.params["actor"]["output"]["kernel"], new.params["actor"]["output"]["kernel"])


def test_the_warm_up_counts_updates():
    config = dataclasses.replace(
        TINY, minibatch_size=1000, optimizer=dataclasses.replace(TINY.optimizer, warmup_updates=4)
    )
    state = init(jax.random.key(0), config, 6, 3)
    rollouts = batch(jax.random.key(1))
    new, metrics = update(config, Fidelity(), state, *rollouts, jax.random.key(2))
    # A first step of LaProp is the learning rate's size: a quarter of it in all three epochs of the first update.
    moved = jnp.abs(new.params["critic"]["output"]["bias"] - state.params["critic"]["output"]["bias"]).max()
    assert 0.5 * 3 * 0.25e-2 < moved <= 3 * 0.25e-2 * 1.001
    # Three such steps hardly move the policy.
    assert 1e-9 < metrics["actor_critic/kl"] < 1e-3


def test_update_vmaps_over_seeds():
    keys = jax.random.split(jax.random.key(0), 2)
    singles, batches = [init(key, TINY, 6, 3) for key in keys], [batch(key) for key in keys]
    stacked = jax.tree.map(lambda *x: np.stack(x), *zip(singles, batches))

    def run(arguments, key):
        state, rollouts = arguments
        return ppo.update(TINY, Fidelity(), state, *rollouts, key)

    many = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(stacked, keys))
    for i, (single, rollouts) in enumerate(zip(singles, batches)):
        expected = update(TINY, Fidelity(), single, *rollouts, keys[i])
        # The kernels of a batch and of one sum in different orders.
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], many), expected, rtol=2e-4, atol=2e-6)


def test_update_learns_a_bandit():
    """Reward 1 for action 0 only: the policy comes to prefer it, the critic to expect it."""
    state = init(jax.random.key(0), TINY, 6, 3)
    for key in jax.random.split(jax.random.key(1), 20):
        features, _, rewards, _ = batch(key)
        logits = actor_critic.policy_logits(TINY, state.params, state.normaliser, features[:, :-1])
        actions = jax.random.categorical(key, logits)
        rewards, ends = (actions == 0).astype(rewards.dtype), jnp.ones(actions.shape, bool)
        state, metrics = update(TINY, Fidelity(), state, features, actions, rewards, ends, key)
    probs = jax.nn.softmax(actor_critic.policy_logits(TINY, state.params, state.normaliser, features))
    assert probs[..., 0].mean() > 0.8
    assert 0.1 < metrics["actor_critic/imagined_value"] < 1.2
    assert metrics["actor_critic/imagined_termination"] == 1
