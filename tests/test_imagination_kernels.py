"""Imagination by GPU kernels, interpreted, gives what the general form gives; the same keys, the same actions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import agent, latents, world_model
from drama_jax.backbones import gpu_dense, gpu_mixer, gpu_rollout, make
from drama_jax.behaviour import gpu_actor
from drama_jax.config import preset
from drama_jax.nn import gpu_keys, gpu_sample, gpu_side_by_side
from drama_jax.replay import Batch


@pytest.fixture
def kernels(monkeypatch):
    """Switches the kernels on, and counts the calls of each while tracing."""
    calls = {}

    def interpreted(module, name):
        function = functools.partial(getattr(module, name), interpret=True)

        def run(*arguments, **options):
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, run)

    for module in (gpu_rollout, gpu_sample, gpu_actor, gpu_keys, gpu_side_by_side):
        monkeypatch.setattr(module, "serves", lambda *arguments: True)
    interpreted(gpu_side_by_side, "side_by_side")
    interpreted(gpu_keys, "apart")
    interpreted(gpu_sample, "sample_latent")
    interpreted(gpu_actor, "choose_actions")
    for name in ("mixer_context", "mixer_step"):
        interpreted(gpu_mixer, name)
    for name in ("add", "embed"):
        interpreted(gpu_dense, name)
    return calls


@pytest.fixture(scope="module")
def inputs():
    config = preset("tiny").agent.with_compute_dtype("float32")

    def jitter(params, scale):
        return jax.tree.map(lambda a: a + scale * jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), params)

    @jax.jit  # one compilation instead of one for every shape
    def make(key):
        state = agent.init(key, config, 6)
        model = state.world_model.replace(params=jitter(state.world_model.params, 0.05))
        behaviour = state.behaviour.replace(params=jitter(state.behaviour.params, 0.1))
        return state.replace(world_model=model, behaviour=behaviour)

    shape = (6, config.imagination.context_length)
    rng = np.random.default_rng(0)
    batch = Batch(
        frames=jnp.asarray(rng.integers(0, 255, (*shape, *config.world_model.autoencoder.image_shape)), jnp.uint8),
        actions=jnp.asarray(rng.integers(0, 6, shape), jnp.int32),
        rewards=jnp.zeros(shape),
        terminals=jnp.zeros(shape, bool),
        firsts=jnp.asarray(rng.random(shape) < 0.3),
    )
    return make(jax.random.key(0)), batch


def test_imagination_is_the_same(inputs, request):
    expected, _ = jax.jit(agent.imagine)(*inputs, jax.random.key(7))
    calls = request.getfixturevalue("kernels")
    # A new function: a compiled one would be found again.
    actual, _ = jax.jit(lambda *arguments: agent.imagine(*arguments))(*inputs, jax.random.key(7))
    layers = inputs[0].config.world_model.backbone.num_layers
    assert calls == {
        "sample_latent": 3,  # posterior, first prior, and the step's: that is traced once
        "mixer_context": layers,
        "apart": 1,
        "choose_actions": 1,
        "embed": 1,
        "mixer_step": layers,
        "add": layers,
        "side_by_side": 1,
    }
    np.testing.assert_array_equal(actual.actions, expected.actions)
    np.testing.assert_array_equal(actual.terminations, expected.terminations)
    np.testing.assert_allclose(actual.features, expected.features, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(actual.rewards, expected.rewards, rtol=2e-4, atol=2e-4)


def test_acting_is_the_same(inputs, request):
    state, batch = inputs
    envs, context = 3, state.config.acting_context
    rng = np.random.default_rng(1)
    acting = agent.Acting(
        frames=jnp.asarray(rng.integers(0, 255, (envs, context, *batch.frames.shape[2:])), jnp.uint8),
        actions=jnp.asarray(rng.integers(0, 6, (envs, context)), jnp.int32),
        length=jnp.asarray([0, 2, context], jnp.int32),
    )
    arguments = state, acting, batch.frames[:envs, 0], jax.random.key(3), jnp.zeros(envs, bool)
    expected, _ = jax.jit(agent.act)(*arguments)
    calls = request.getfixturevalue("kernels")
    actual, _ = jax.jit(lambda *arguments: agent.act(*arguments))(*arguments)
    assert calls == {"sample_latent": 2, "choose_actions": 1}
    np.testing.assert_array_equal(actual, expected)


def test_without_a_promise_of_one_hot_latents_the_kernels_do_not_serve(inputs, kernels):
    state, _ = inputs
    wm = state.config.world_model
    latent = jnp.full((2, 3, wm.autoencoder.latent_size), 0.5)
    action = jnp.zeros((2, 3), jnp.int32)
    backbone = make(wm.backbone, 6, jnp.float32)
    variables = {"params": state.world_model.params["backbone"]}
    _, window = jax.eval_shape(
        lambda z, a: backbone.apply(variables, z, a, horizon=2, method="open_window"), latent, action
    )
    assert not isinstance(window, gpu_rollout.GpuWindow) and kernels == {}


def test_latents_are_one_hot_and_of_the_compute_dtype(inputs):
    state, batch = inputs
    wm = state.config.world_model
    sample = jax.jit(latents.sample_posterior, static_argnums=0)(wm, state.world_model, jax.random.key(1), batch.frames)
    c = wm.autoencoder
    assert sample.shape == (*batch.actions.shape, c.latent_size) and sample.dtype == jnp.float32
    groups = sample.reshape(*batch.actions.shape, c.categoricals, c.classes)
    np.testing.assert_array_equal(groups.sum(axis=-1), 1)


def test_samples_are_those_of_the_heads_distributions(inputs):
    state, batch = inputs
    wm, params, key = state.config.world_model, state.world_model.params, jax.random.key(2)

    @jax.jit
    def both(state, frames):
        hidden = jax.random.normal(key, (5, wm.backbone.width))
        prior = latents.sample_prior(wm, params, key, hidden), world_model.prior(wm, params, hidden)
        model = state.world_model
        posterior = latents.sample_posterior(wm, model, key, frames), world_model.posterior(wm, model, frames)
        return [(drawn, latents.sample(wm, key, log_probs)) for drawn, log_probs in (prior, posterior)]

    for drawn, expected in both(state, batch.frames):
        np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("first", [0, 1])
def test_steps_side_by_side_are_the_stacked_ones(first):
    rng = np.random.default_rng(first)
    seeds, batch, steps = 2, 3, 4
    z, d = (jnp.asarray(rng.normal(size=(steps, seeds, batch, size)), jnp.bfloat16) for size in (16, 32))

    def joined(z, d):
        return gpu_side_by_side.side_by_side(list(zip(z, d)), first, interpret=True)

    features, hiddens = jax.jit(jax.vmap(joined, in_axes=1))(z, d)
    expected = np.concatenate([z, d], axis=-1)
    np.testing.assert_array_equal(features, expected.transpose(1, 2, 0, 3))
    np.testing.assert_array_equal(hiddens, np.asarray(d)[first : first + steps - 1].transpose(1, 2, 0, 3))
