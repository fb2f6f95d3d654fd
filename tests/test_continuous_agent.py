"""The agent with vector observations and continuous actions: autoencoder, stem, replay, and whole runs of two seeds."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import action_space, agent, backbones, distributions, replay, vae, world_model
from drama_jax.action_space import Continuous
from drama_jax.config import (
    AgentConfig,
    AutoencoderConfig,
    BackboneConfig,
    BehaviourConfig,
    ConfigError,
    ImaginationConfig,
    ReplayConfig,
    RunConfig,
    WorldModelConfig,
)
from drama_jax.envs.jax_env import JaxEnv, JaxEnvState, Outcome
from drama_jax.training import in_graph

VECTOR = AutoencoderConfig(vector_size=3, vector_layers=1, vector_units=16, categoricals=4, classes=4)
CONFIG = AgentConfig(
    world_model=WorldModelConfig(
        autoencoder=VECTOR,
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
ACTIONS = Continuous(2)


class PointMass(JaxEnv):
    """Two forces push a point; it sees its place and the time left, far beyond -1..1."""

    def __init__(self):
        self.num_actions = ACTIONS
        self.frame_shape = (3,)

    def reset(self, key):
        return self._state(jax.random.uniform(key, (2,), minval=-1.0), jnp.zeros((), jnp.int32))

    def step(self, state, action, key):
        place, time = state.inner
        place = place + 0.1 * action
        last = time + 1 == 6
        outcome = Outcome(reward=-jnp.abs(place).sum(), terminal=jnp.zeros((), bool), last=last)
        following = self._state(place, time + 1)
        return jax.tree.map(lambda new, old: jnp.where(last, new, old), self.reset(key), following), outcome

    def _state(self, place, time):
        frame = jnp.append(place, 100.0 * (6 - time).astype(jnp.float32))
        return JaxEnvState(inner=(place, time), frame=frame, first=time == 0)


def test_a_vector_goes_through_the_autoencoder(x64):
    dtype = jnp.float64
    frames = jnp.asarray([[0.0, -3.0, 1e6], [1.0, 2.0, -0.5]], jnp.float32)
    rng = np.random.default_rng(1)
    params, stats = jax.eval_shape(lambda key: vae.init(key, VECTOR, dtype), jax.random.key(0))
    assert stats == {"encoder": {}, "decoder": {}}
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    directions = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(5, *leaf.shape))), params)

    def error(params):
        inputs = vae.to_inputs(VECTOR, frames, dtype)
        embedding, moved = vae.encode(VECTOR, params, stats, inputs, train=True, dtype=dtype)
        probs = jnp.exp(vae.posterior(VECTOR, params, embedding, dtype=dtype))
        outputs, moved = vae.decode(VECTOR, params, moved, probs.reshape(2, -1), train=True, dtype=dtype)
        assert embedding.shape == (2, 16) and outputs.shape == (2, 3) and moved == stats
        return jnp.square(outputs - inputs).sum(), (inputs, vae.to_frames(VECTOR, inputs), probs)

    @jax.jit
    def everything(params, directions):
        (_, seen), gradient = jax.value_and_grad(error, has_aux=True)(params)

        def along(direction):
            ahead, behind = (jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (1e-6, -1e-6))
            return (error(ahead)[0] - error(behind)[0]) / 2e-6

        slopes = jax.tree.map(lambda g, d: jnp.sum(g * d, axis=tuple(range(1, d.ndim))), gradient, directions)
        return seen, gradient, sum(jax.tree.leaves(slopes)), jax.lax.map(along, directions)

    (inputs, back, probs), gradient, slopes, differences = everything(params, directions)
    assert size == sum(leaf.size for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(slopes, differences, rtol=1e-6)
    np.testing.assert_allclose(inputs, np.sign(frames) * np.log1p(np.abs(frames)), rtol=1e-6)
    np.testing.assert_allclose(back, frames, rtol=1e-5)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize("name", ["mamba2", "transformer"])
def test_a_continuous_action_takes_part_by_the_rows_that_a_discrete_one_picks(x64, name):
    """One-hot vectors are the indices; any other vector is the sum of rows, in sequences and in steps."""
    config = BackboneConfig(name=name, width=16, head_dim=8, chunk_size=4, num_layers=1, max_length=8)
    discrete, continuous = (backbones.make(config, actions, jnp.float64) for actions in (3, Continuous(3)))
    rng = np.random.default_rng(2)
    latent, index = jnp.asarray(rng.normal(size=(2, 5, 6))), jnp.asarray(rng.integers(0, 3, (2, 5)), jnp.int32)
    vector = jnp.asarray(rng.uniform(-1, 1, (2, 5, 3)), jnp.float32)

    shapes = jax.eval_shape(discrete.init, jax.random.key(3), latent, index)
    variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), shapes)

    @jax.jit
    def features(variables):
        one, _ = discrete.apply(variables, latent, index)
        same, _ = continuous.apply(variables, latent, jax.nn.one_hot(index, 3, dtype=jnp.float32))
        other, _ = continuous.apply(variables, latent, vector)
        parts, window = continuous.apply(
            variables, latent[:, :4], vector[:, :4], horizon=1, classes=3, method="open_window"
        )
        last, _ = continuous.apply(variables, latent[:, 4], vector[:, 4], window, method="step")
        return one, same, other, jnp.concatenate([parts, last[:, None]], axis=1)

    one, same, other, by_step = features(variables)
    np.testing.assert_allclose(same, one, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_step, other, rtol=1e-9, atol=1e-12)
    assert np.abs(other - one).max() > 1e-3


def test_the_reconstruction_loss_is_a_squared_error_of_symlog_values():
    frames = np.random.default_rng(4).normal(scale=50, size=(2, 8, 3)).astype(np.float32)
    flags, zeros = np.zeros((2, 8), bool), np.zeros((2, 8), np.float32)
    batch = replay.Batch(
        frames=frames, actions=np.zeros((2, 8, 2), np.float32), rewards=zeros, terminals=flags, firsts=flags
    )
    outputs = np.random.default_rng(5).normal(size=(2, 8, 3)).astype(np.float32)
    out = world_model.Forward(
        embedding=np.zeros((2, 8, 16), np.float32),
        posterior=np.zeros((2, 8, 4, 4), np.float32),
        latent=np.zeros((2, 8, 16), np.float32),
        reconstruction=outputs,
        features=np.zeros((2, 8, 16), np.float32),
        prior=np.zeros((2, 8, 4, 4), np.float32),
        reward_logits=np.zeros((2, 8, 255), np.float32),
        termination_logits=zeros,
    )
    _, terms = jax.jit(lambda out, batch: world_model.losses(CONFIG.world_model, out, batch, None))(out, batch)
    expected = np.square(outputs - np.sign(frames) * np.log1p(np.abs(frames))).sum(axis=-1).mean()
    np.testing.assert_allclose(terms["reconstruction_loss"], expected, rtol=1e-5)


def shapes(config=CONFIG):
    return jax.eval_shape(lambda key: agent.init(key, config, ACTIONS), jax.random.key(0))


def test_replay_and_contexts_are_as_configured():
    memory = shapes().replay
    assert (memory.frames.shape, memory.frames.dtype) == ((32, 3), jnp.float32)
    assert (memory.actions.shape, memory.actions.dtype, memory.capacity) == ((32, 2), jnp.float32, 32)
    ring = replay.init(ReplayConfig(capacity=3), (3,), ACTIONS, dtype="float32")
    for i in range(4):
        step = replay.Transition(
            frame=jnp.full(3, 1e3 + i),
            action=jnp.full(2, -0.1 * i),
            reward=jnp.asarray(i, jnp.float32),
            terminal=jnp.asarray(False),
            first=jnp.asarray(False),
        )
        ring = replay.add(ring, step)
    batch = replay.gather(ring, jnp.asarray([0, 1]), 2)
    np.testing.assert_array_equal(batch.frames[..., 0], [[1001, 1002], [1002, 1003]])
    np.testing.assert_allclose(batch.actions[..., 1], [[-0.1, -0.2], [-0.2, -0.3]], rtol=1e-6)
    for context in (agent.initial_acting, agent.initial_encoded_acting):
        acting = jax.eval_shape(lambda state, make=context: make(state, 5), shapes())
        assert acting.actions.shape == (5, 4, 2) and acting.actions.dtype == jnp.float32


def plausible(shapes, seeds):
    """A stacked state with a full replay of random steps, without the compilation that `agent.init` takes."""
    rng = np.random.default_rng(8)

    def fill(path, leaf):
        name, shape = jax.tree_util.keystr(path), (seeds, *leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(6), seeds)
        if "params" in name or "frames" in name or "actions" in name or "slow_critic" in name:
            return rng.uniform(-0.3, 0.3, shape).astype(leaf.dtype)
        ones = ("variance", "count", "learning_rate", "tau") if leaf.dtype == jnp.float32 else ()
        return np.full(shape, 1e-3 if "learning_rate" in name else any(one in name for one in ones), leaf.dtype)

    state = jax.tree_util.tree_map_with_path(fill, shapes)
    return dataclasses.replace(state, replay=dataclasses.replace(state.replay, size=np.full(seeds, 32, np.int32)))


@pytest.fixture(scope="module")
def trained():
    """Two seeds, vmapped, that act and are updated twice; (before, after, actions, metrics)."""

    def step(carry, key):
        state, acting = carry
        frame, first = 100 * jax.random.normal(key, (1, 3)), jnp.zeros(1, bool)
        action, acting = agent.act(state, acting, frame, key, first)
        state, metrics = agent.update(state, transition(frame[0], action[0]))
        return (state, acting), (action[0], metrics)

    def run(state):
        start = (state, agent.initial_acting(state, 1))
        (after, _), (actions, metrics) = jax.lax.scan(step, start, jax.random.split(state.key, 2))
        return after, actions, metrics

    before = plausible(shapes(), 2)
    return before, *jax.jit(jax.vmap(run))(before)


def test_updates_of_two_seeds_are_finite_and_move_everything(trained):
    before, after, actions, metrics = trained
    chex.assert_tree_all_finite((metrics, after.world_model, after.behaviour, after.replay))
    assert {"world_model/reconstruction_loss", "actor_critic/entropy"} <= set(metrics)
    for name, old, new in (
        ("autoencoder", before.world_model.params["encoder"], after.world_model.params["encoder"]),
        ("stem", before.world_model.params["backbone"]["stem"], after.world_model.params["backbone"]["stem"]),
        ("actor", before.behaviour.params["actor"], after.behaviour.params["actor"]),
        ("critic", before.behaviour.params["critic"], after.behaviour.params["critic"]),
    ):
        for seed in range(2):
            leaves = zip(*map(jax.tree.leaves, (old, new)), strict=True)
            assert all(not np.array_equal(a[seed], b[seed]) for a, b in leaves), name
    assert (np.asarray(after.guard.skipped) == 0).all()
    assert actions.shape == (2, 2, 2) and (np.abs(actions) < 1).all() and len(np.unique(actions)) == 8
    # The first two slots hold them now.
    np.testing.assert_array_equal(after.replay.actions[:, :2], actions)


def test_a_run_in_an_environment_of_vectors_and_forces_is_traced():
    state, history, metrics = jax.eval_shape(
        lambda key: in_graph.run(CONFIG, PointMass(), key, steps=18), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes())
    assert history.rewards.shape == (18,) and metrics["actor_critic/policy_loss"].shape == (2,)


def test_what_is_imagined_reconstructed_and_dreamt_has_the_right_shapes(trained):
    state = jax.tree.map(lambda leaf: leaf[0], trained[0])
    fidelity = dataclasses.replace(CONFIG.fidelity, first_action_from_policy=False)  # random then
    imagination = dataclasses.replace(CONFIG.imagination, unroll=4)  # the horizon: another path
    config = dataclasses.replace(CONFIG, fidelity=fidelity, imagination=imagination)
    state = dataclasses.replace(state, config=config)

    def everything(state):
        batch = replay.gather(state.replay, jnp.arange(2), 6)
        imagined, _ = agent.imagine(state, replay.gather(state.replay, jnp.arange(2), 3), state.key)
        acting, encoded = agent.initial_acting(state, 2), agent.initial_encoded_acting(state, 2)
        first = jnp.ones(2, bool)
        return (
            imagined.actions,
            agent.reconstruct(state, batch.frames, state.key),
            agent.imagine_video(state, batch, state.key, 4),
            agent.act(state, acting, batch.frames[:, 0], state.key, first)[0],
            agent.act(state, encoded, batch.frames[:, 0], state.key, first, greedy=True)[0],
        )

    wanted = [(2, 4, 2), (2, 6, 3), (2, 6, 3), (2, 2), (2, 2)]
    assert [(array.shape, array.dtype) for array in jax.eval_shape(everything, state)] == [
        (shape, jnp.float32) for shape in wanted
    ]


@pytest.mark.parametrize("name", ["mamba", "gru", "rwkv"])
def test_the_other_backbones_take_continuous_actions(name):
    config = BackboneConfig(name=name, width=16, head_dim=8, chunk_size=4, num_layers=1)
    module = backbones.make(config, ACTIONS, jnp.float32)
    latent, action = jnp.zeros((2, 5, 6)), jnp.zeros((2, 5, 2))

    def everything(key):
        variables = module.init(key, latent, action)
        features, state = module.apply(variables, latent, action)
        return features, module.apply(variables, latent[:, 0], action[:, 0], state, method="step")[0]

    shapes = jax.eval_shape(everything, jax.random.key(0))
    assert [array.shape for array in shapes] == [(2, 5, 16), (2, 16)]


def test_random_actions_fill_the_cube():
    key = jax.random.key(7)
    actions = action_space.uniform(key, Continuous(3), (2000,))
    assert actions.shape == (2000, 3) and actions.dtype == jnp.float32
    assert -1 <= actions.min() < -0.99 and 0.99 < actions.max() < 1
    np.testing.assert_array_equal(action_space.uniform(key, 5, (9,)), jax.random.randint(key, (9,), 0, 5))


def test_symlog_of_vectors_is_the_one_of_rewards():
    frames = jnp.asarray([[3.0, -4.0, 0.0]])
    np.testing.assert_array_equal(vae.to_inputs(VECTOR, frames, jnp.float32), distributions.symlog(frames))


def transition(frame, action):
    return replay.Transition(
        frame=frame, action=action, reward=jnp.zeros(()), terminal=jnp.asarray(False), first=jnp.asarray(False)
    )


def look(actions, **options):
    state = shapes().world_model
    latent = jnp.zeros((2, 5, 16))
    return jax.eval_shape(
        lambda params: world_model.observe(
            CONFIG.world_model, params, latent, actions, **{"num_actions": ACTIONS} | options
        ),
        state.params,
    )


FOUR = dataclasses.replace(CONFIG.world_model, autoencoder=dataclasses.replace(VECTOR, vector_size=4))
BAD = [
    (lambda: Continuous(0), "Continuous.size must be at least 1, an integer, got 0"),
    (lambda: Continuous(2.0), "Continuous.size must be at least 1, an integer, got 2.0"),
    (lambda: AutoencoderConfig(vector_size=-1), "AutoencoderConfig.vector_size must be >= 0, got -1"),
    (lambda: AutoencoderConfig(vector_layers=0), "AutoencoderConfig.vector_layers must be positive, got 0"),
    (
        lambda: RunConfig(agent=CONFIG),
        "agent.world_model.autoencoder.vector_size must be 0 for Atari, which shows images, got 3",
    ),
    (lambda: replay.init(ReplayConfig(), (3,), "2"), "replay.init: num_actions must be an integer from 1"),
    (lambda: replay.init(ReplayConfig(), (3,), dtype="int8"), "dtype must be 'uint8' or 'float32', got 'int8'"),
    (
        lambda: replay.init(ReplayConfig(), (3, 2)),
        "frame_shape must be (height, width, channels), or (entries,) of a vector, got (3, 2)",
    ),
    (
        lambda: jax.eval_shape(agent.observe, shapes(), transition(jnp.zeros(3), jnp.zeros(3))),
        "replay.add: action must be float32 [2], got float32 [3]",
    ),
    (
        lambda: jax.eval_shape(agent.observe, shapes(), transition(jnp.zeros(4), jnp.zeros(2))),
        "replay.add: frame must be float32 [3], got float32 [4]",
    ),
    (
        lambda: look(jnp.zeros((2, 5), jnp.int32)),
        "world_model.observe: actions must be float [B, T, 2], here [2, 5, 2]",
    ),
    (lambda: look(jnp.zeros((2, 5, 3))), "world_model.observe: actions must be float [B, T, 2], here [2, 5, 2], got"),
    (
        lambda: look(jnp.zeros((2, 5, 3)), num_actions=Continuous(3)),
        "these parameters are for S + A = 18, got latents of S = 16 and A = 3 actions",
    ),
    (lambda: vae.to_inputs(VECTOR, jnp.zeros((2, 4)), jnp.float32), "frames must be float32 [N, 3]"),
    (lambda: vae.to_frames(VECTOR, jnp.zeros((2, 4))), "outputs must be float [N, 3]"),
    (
        lambda: in_graph.check_frames(dataclasses.replace(CONFIG, world_model=FOUR), PointMass()),
        "the agent sees frames of shape (4,), but the environment shows (3,)",
    ),
]


@pytest.mark.parametrize(("call", "line"), BAD, ids=[line for _, line in BAD])
def test_wrong_arguments_are_one_line(call, line):
    with pytest.raises((ConfigError, ValueError, TypeError)) as error:
        call()
    assert line in str(error.value) and "\n" not in str(error.value)
