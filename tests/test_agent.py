"""The agent as a whole at a tiny size: one trace, vmap equals loop, alignment, resets, acting."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import agent, replay, world_model
from drama_jax.config import (
    AgentConfig,
    AutoencoderConfig,
    BackboneConfig,
    BehaviourConfig,
    Fidelity,
    ImaginationConfig,
    ReplayConfig,
    WorldModelConfig,
)

ACTIONS = 3
CONFIG = AgentConfig(
    world_model=WorldModelConfig(
        autoencoder=AutoencoderConfig(image_size=8, depths=(4, 8), categoricals=4, classes=4),
        backbone=BackboneConfig(width=16, head_dim=8, chunk_size=4, num_layers=1),
        head_units=16,
        batch_size=2,
        batch_length=8,
        compute_dtype="float32",
    ),
    imagination=ImaginationConfig(batch_size=4, context_length=3, horizon=4, unroll=1),
    behaviour=BehaviourConfig(
        actor_layers=1, actor_units=16, critic_layers=1, critic_units=16, compute_dtype="float32"
    ),
    replay=ReplayConfig(capacity=32),
    acting_context=4,
    warmup_steps=16,
)
REFERENCE = dataclasses.replace(
    CONFIG,
    fidelity=Fidelity(**{field.name: False for field in dataclasses.fields(Fidelity)}),
    world_model=dataclasses.replace(CONFIG.world_model, free_bits_each=False),
)


def transitions(num, seed=0):
    rng = np.random.default_rng(seed)
    firsts = np.zeros(num, bool)
    firsts[::7] = True
    return replay.Transition(
        frame=jnp.asarray(rng.integers(0, 256, (num, 8, 8, 3)), jnp.uint8),
        action=jnp.asarray(rng.integers(0, ACTIONS, num), jnp.int32),
        reward=jnp.asarray(rng.normal(size=num), jnp.float32),
        terminal=jnp.asarray(np.roll(firsts, -1)),
        first=jnp.asarray(firsts),
    )


def at(stacked, index):
    return jax.tree.map(lambda x: x[index], stacked)


@pytest.fixture(scope="module")
def filled():
    """`filled(config, seed)`: an agent whose replay holds the warm-up steps."""

    @jax.jit
    def fill(state, steps):
        return jax.lax.scan(lambda s, step: (agent.observe(s, step), None), state, steps)[0]

    @functools.cache
    def make(config=CONFIG, seed=0):
        init = jax.jit(agent.init, static_argnums=(1, 2))
        return fill(init(jax.random.key(seed), config, ACTIONS), transitions(config.warmup_steps, seed))

    return make


@pytest.fixture(scope="module")
def update():
    """The jitted, donated update, which fails when it traces a configuration twice."""
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(agent.update, n=2), donate_argnums=0)  # xs and reference


def copied(state):
    return jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("config", [CONFIG, REFERENCE], ids=["xs", "reference"])
def test_update_traces_once_and_moves_everything(filled, update, config):
    before = filled(config)
    steps = transitions(4, seed=9)
    state = copied(before)
    frames = state.replay.frames
    for i in range(4):
        state, metrics = update(state, at(steps, i))
    assert frames.is_deleted()  # donated: the replay is not copied
    chex.assert_tree_all_finite((metrics, state.world_model, state.behaviour))
    moved = [
        ("world model", before.world_model.params, state.world_model.params),
        ("batch statistics", before.world_model.batch_stats, state.world_model.batch_stats),
        ("behaviour", before.behaviour.params, state.behaviour.params),
        ("slow critic", before.behaviour.slow_critic, state.behaviour.slow_critic),
        ("normaliser", before.behaviour.normaliser, state.behaviour.normaliser),
    ]
    for name, old, new in moved:
        assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)), name
    assert state.replay.size == config.warmup_steps + 4
    assert state.replay.counters.trained.sum() == 4 * config.world_model.batch_size
    assert state.replay.counters.imagined.sum() == 4 * config.imagination.batch_size
    assert {"world_model/total_loss", "world_model/grad_norm", "actor_critic/entropy"} <= set(metrics)


def test_an_update_that_is_not_finite_is_skipped_and_counted(filled, update):
    before = copied(filled(CONFIG))
    state = copied(before)
    state = state.replace(replay=state.replay.replace(rewards=jnp.full_like(state.replay.rewards, jnp.nan)))
    steps = transitions(3, seed=9)
    for i in range(2):
        state, metrics = update(state, at(steps, i))
    assert np.isnan(metrics["world_model/total_loss"])
    for part in ("params", "batch_stats", "opt_state"):
        chex.assert_trees_all_equal(getattr(state.world_model, part), getattr(before.world_model, part))
    # The behaviour is trained in imagination, where no reward of the replay is seen.
    np.testing.assert_array_equal(state.guard.skipped, [2, 0])
    np.testing.assert_array_equal(state.guard.in_a_row, [2, 0])
    starts = np.asarray(state.guard.slots)
    assert len(set(starts)) == CONFIG.world_model.batch_size
    assert (starts >= 0).all()
    chex.assert_tree_all_finite((state.world_model, state.behaviour))

    state = state.replace(replay=state.replay.replace(rewards=jnp.zeros_like(state.replay.rewards)))
    state, metrics = update(state, at(steps, 2))
    assert np.isfinite(metrics["world_model/total_loss"])
    np.testing.assert_array_equal(state.guard.skipped, [2, 0])
    np.testing.assert_array_equal(state.guard.in_a_row, [0, 0])
    assert agent.state_metrics(state)["guard/skipped_world_model_updates"] == 2
    moved = zip(jax.tree.leaves(state.world_model.params), jax.tree.leaves(before.world_model.params), strict=True)
    assert any(not np.array_equal(new, old) for new, old in moved)


def test_a_behaviour_update_that_is_not_finite_is_skipped(filled, update):
    before = copied(filled(CONFIG))
    state = copied(before)
    scale = state.behaviour.return_scale
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), scale)
    state = state.replace(behaviour=state.behaviour.replace(return_scale=broken))
    state, _ = update(state, at(transitions(1, seed=9), 0))
    np.testing.assert_array_equal(state.guard.skipped, [0, 1])
    chex.assert_trees_all_equal(state.behaviour.params, before.behaviour.params)
    chex.assert_trees_all_equal(state.behaviour.slow_critic, before.behaviour.slow_critic)


def test_vmap_over_states_equals_each_alone(filled, update):
    """Two updates of two stacked agents, with learning rates and temperature that differ."""
    alone = [copied(filled(CONFIG, seed)) for seed in (0, 1)]
    alone[1] = alone[1].replace(
        hyper=alone[1].hyper.replace(tau=jnp.float32(3.0), world_model_learning_rate=jnp.float32(1e-3))
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    steps = transitions(2, seed=5)
    batched = jax.jit(jax.vmap(agent.update))
    for i in range(2):
        both = jax.tree.map(lambda x: jnp.stack([x, x]), at(steps, i))
        stacked, metrics = batched(stacked, both)
        for s in range(2):
            alone[s], expected = update(alone[s], at(steps, i))
            for name, value in expected.items():
                np.testing.assert_allclose(metrics[name][s], value, rtol=1e-3, atol=1e-5, err_msg=name)
    for s in range(2):
        np.testing.assert_array_equal(stacked.replay.counters.trained[s], alone[s].replay.counters.trained)
        np.testing.assert_array_equal(stacked.replay.counters.imagined[s], alone[s].replay.counters.imagined)
        assert stacked.key[s] == alone[s].key


@pytest.fixture(scope="module")
def imagine():
    return jax.jit(agent.imagine)


def context(state, starts=(0, 1, 2, 3)):
    return replay.gather(state.replay, jnp.asarray(starts), CONFIG.imagination.context_length)


def test_imagined_reward_is_what_the_action_caused(filled, imagine):
    """Entry i of the aligned reward is entry i + 1 of the released one: same key, same rollout."""
    released = filled(REFERENCE).replace(
        config=dataclasses.replace(
            REFERENCE, fidelity=dataclasses.replace(REFERENCE.fidelity, reward_follows_action=True)
        )
    )
    early, _ = imagine(filled(REFERENCE), context(filled()), jax.random.key(3))
    aligned, _ = imagine(released, context(filled()), jax.random.key(3))
    np.testing.assert_array_equal(early.actions, aligned.actions)
    np.testing.assert_allclose(early.rewards[:, 1:], aligned.rewards[:, :-1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(early.rewards, aligned.rewards)
    assert aligned.features.shape == (4, 5, CONFIG.world_model.feature_size)


def test_statistics_move_in_imagination_only_as_released(filled, imagine):
    state = filled()
    _, normaliser = imagine(state, context(state), jax.random.key(0))
    chex.assert_trees_all_equal(normaliser, state.behaviour.normaliser)
    _, moved = imagine(filled(REFERENCE), context(state), jax.random.key(0))
    rows = CONFIG.imagination.batch_size * CONFIG.imagination.horizon
    np.testing.assert_allclose(moved.count, state.behaviour.normaliser.count + rows)


@pytest.fixture(scope="module")
def act():
    return jax.jit(agent.act, static_argnames="greedy")


def run_episode(act, state, frames, key, first_step=0):
    acting = agent.initial_acting(state, frames.shape[1])
    for i, frame in enumerate(frames):
        first = jnp.full(frames.shape[1], i == first_step)
        actions, acting = act(state, acting, frame, jax.random.fold_in(key, i), first)
    return actions, acting


def test_acting_context_holds_the_episode_so_far(filled, act):
    state = filled()
    frames = transitions(12, seed=4).frame.reshape(6, 2, 8, 8, 3)
    actions, acting = run_episode(act, state, frames, jax.random.key(0))
    np.testing.assert_array_equal(acting.length, [4, 4])
    np.testing.assert_array_equal(acting.frames[0], frames[2:, 0])
    np.testing.assert_array_equal(acting.actions[:, -1], actions)


def test_first_clears_the_context(filled, act):
    """What an environment did before its episode's first frame cannot change its action afterwards."""
    state = filled()
    frames = transitions(12, seed=4).frame.reshape(6, 2, 8, 8, 3)
    other = frames.at[:3].set(255 - frames[:3])
    kept = [run_episode(act, state, f, jax.random.key(0), first_step=3) for f in (frames, other)]
    np.testing.assert_array_equal(kept[0][0], kept[1][0])
    np.testing.assert_array_equal(kept[0][1].length, [3, 3])


def test_a_player_acts_as_the_agent_it_is_of_and_holds_nothing_that_is_not_read(filled, act):
    state = filled()
    player, acting = agent.player(state), agent.initial_acting(state, 2)
    arguments = acting, transitions(2, seed=4).frame, jax.random.key(0), jnp.zeros(2, bool)
    chex.assert_trees_all_equal(act(player, *arguments), act(state, *arguments))
    jaxpr = jax.make_jaxpr(agent.act)(player, *arguments).jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    leaves = jax.tree_util.tree_leaves_with_path(player)
    unread = [jax.tree_util.keystr(path) for (path, _), one in zip(leaves, jaxpr.invars) if id(one) not in read]
    assert unread == [] and len(leaves) < len(jax.tree.leaves(state)) / 2


def test_encoded_acting_chooses_the_same_actions(filled, act):
    """Also over the start of an episode, where the context is cleared, and with a context that is full."""
    state = filled()
    frames = transitions(60, seed=4).frame.reshape(10, 6, 8, 8, 3)
    first = jnp.arange(10)[:, None] == jnp.asarray([0, 0, 0, 3, 9, 5])  # environments start anew at different steps
    plain, encoded = agent.initial_acting(state, 6), agent.initial_encoded_acting(state, 6)
    for i, frame in enumerate(frames):
        key = jax.random.key(i)
        wanted, plain = act(state, plain, frame, key, first[i], greedy=True)
        actions, encoded = act(state, encoded, frame, key, first[i], greedy=True)
        np.testing.assert_array_equal(actions, wanted)
    np.testing.assert_array_equal(encoded.length, plain.length)
    posterior = world_model.posterior(state.config.world_model, state.world_model, plain.frames)
    np.testing.assert_allclose(encoded.log_probs[0], posterior[0], rtol=1e-5, atol=1e-6)


def logits_of_first_step(act, config, filled):
    state = filled(config)
    frame = transitions(64, seed=8).frame
    acting = agent.initial_acting(state, 64)
    first = jnp.ones(64, bool)
    return [act(state, acting, frame, jax.random.key(k), first, greedy=True)[0] for k in (0, 1)]


def test_first_action_comes_from_the_policy_or_is_random(filled, act):
    """Greedy actions of a first step depend on the frame alone (but for latent noise), or are uniform as released."""
    policy = logits_of_first_step(act, CONFIG, filled)
    released = logits_of_first_step(act, REFERENCE, filled)
    assert np.mean(policy[0] == policy[1]) > np.mean(released[0] == released[1])
    assert len(np.unique(released[0])) == ACTIONS


def test_video_and_reconstruction_shapes(filled):
    state = filled()
    batch = replay.gather(state.replay, jnp.asarray([0, 2]), 6)
    video = jax.jit(agent.imagine_video, static_argnums=3)(state, batch, jax.random.key(0), 3)
    frames = jax.jit(agent.reconstruct)(state, batch.frames, jax.random.key(0))
    for out in (video, frames):
        assert out.shape == (2, 6, 8, 8, 3)
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1


def test_state_metrics_are_quantiles_over_stored_steps(filled):
    state = filled()
    trained = jnp.zeros(32, jnp.int32).at[:16].set(jnp.arange(16)).at[16:].set(99)
    state = state.replace(replay=state.replay.replace(counters=state.replay.counters.replace(trained=trained)))
    metrics = agent.state_metrics(state)
    assert metrics["replay/size"] == 16
    np.testing.assert_allclose(metrics["dfs/trained_q50"], 7.5)
    np.testing.assert_allclose(metrics["dfs/trained_max"], 15)
