"""The kernels of the imagined step, interpreted, against the mixer's and the stem's own forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.backbones import gpu_dense, gpu_mixer, gpu_rollout, mamba2, parts
from drama_jax.config import BackboneConfig, preset
from drama_jax.nn import rms_norm
from tests.tools import lower_for_cuda

KEY = jax.random.key(0)
CONFIG = BackboneConfig(width=32, head_dim=16, state_dim=16)
B, T, L = 3, 5, 4
OPTIONS = {"epsilon": 1e-5, "interpret": True}
mixer_context = jax.jit(functools.partial(gpu_mixer.mixer_context, horizon=L, **OPTIONS))
mixer_step = jax.jit(functools.partial(gpu_mixer.mixer_step, **OPTIONS))
DTYPES = [jnp.float32, jnp.bfloat16]


def jitter(params):
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), params)


def close(actual, expected, dtype):
    """To some roundings of the dtype, on the array's scale."""
    tolerance = 2e-5 if dtype == jnp.float32 else 1e-2
    expected, actual = jnp.asarray(expected, jnp.float32), jnp.asarray(actual, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * float(jnp.abs(expected).max()))


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def mixer(request):
    module = mamba2.Mamba2Mixer(CONFIG, request.param)
    start = mamba2.Mamba2Backbone(CONFIG, 2, request.param).initial_state(B).layers[0]
    return module, jitter(jax.jit(module.init)(KEY, jnp.zeros((B, 2, 32)), start)), request.param


def in_proj(module, variables, x):
    return module.apply(variables, x, method=lambda self, x: self.in_proj(x))


def out_proj(module, variables, x):
    return module.apply(variables, x, method=lambda self, x: self.out_proj(x))


@pytest.mark.parametrize("time", [2, T])  # fewer steps than the convolution is wide, and more
def test_context_and_steps_equal_the_mixer(mixer, time):
    module, variables, dtype = mixer
    if time < T and dtype != jnp.float32:
        pytest.skip("one dtype will do")
    weights = gpu_mixer.MixerWeights.of(variables["params"])
    u = jax.random.normal(KEY, (B, time, 32))
    index = jax.random.randint(KEY, (B, time), 0, 2).cumsum(axis=1).astype(jnp.int32)
    open_window = functools.partial(module.apply, horizon=L, unrolled=False, method="open_window")
    expected, window = jax.jit(open_window)(variables, u, index)
    plain_step = jax.jit(functools.partial(module.apply, method="step"))
    normed, mine = mixer_context(in_proj(module, variables, u), index, weights)
    close(out_proj(module, variables, normed), expected, dtype)
    close(mine.context_weights, window.weights[:, :time], dtype)
    for step in range(L):
        v = jax.random.normal(jax.random.key(step), (B, 32))
        expected, window = plain_step(variables, v, window)
        normed, mine = mixer_step(in_proj(module, variables, v), mine, weights)
        close(out_proj(module, variables, normed), expected, dtype)
    before = mine.rollout
    normed, mine = mixer_step(in_proj(module, variables, v), mine, weights)
    assert bool(jnp.isnan(normed).all()), "a step beyond the horizon must not look like a result"
    np.testing.assert_array_equal(mine.rollout, before)


def test_steps_vmap_over_seeds(mixer):
    module, variables, dtype = mixer
    if dtype != jnp.float32:
        pytest.skip("one dtype will do")
    weights = gpu_mixer.MixerWeights.of(variables["params"])
    index = jnp.zeros((B, T), jnp.int32)

    def run(u, v, weights):
        _, window = gpu_mixer.mixer_context(u, index, weights, horizon=L, **OPTIONS)
        first, window = gpu_mixer.mixer_step(v, window, weights, **OPTIONS)
        second, window = gpu_mixer.mixer_step(v, window, weights, **OPTIONS)
        return first, second, window

    u = in_proj(module, variables, jax.random.normal(KEY, (2, B, T, 32)))
    v = in_proj(module, variables, jax.random.normal(KEY, (2, B, 32)))
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), weights)
    batched = jax.jit(jax.vmap(run))(u, v, stacked)
    for seed in range(2):
        one = jax.tree.map(lambda a, seed=seed: a[seed], (u, v, stacked))
        jax.tree.map(lambda a, b, seed=seed: close(a[seed], b, jnp.float32), batched, jax.jit(run)(*one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stem_and_residual_equal_the_modules(dtype):
    batch, groups, classes, width, actions = 19, 4, 16, 32, 6
    latent = jax.nn.one_hot(jax.random.randint(KEY, (batch, groups), 0, classes), classes, dtype=dtype)
    latent = latent.reshape(batch, -1)
    action = jax.random.randint(KEY, (batch,), 0, actions)
    module = parts.Stem(width, actions, dtype)
    stem = jitter(module.init(KEY, latent, action)["params"])
    block_scale = jnp.exp(jax.random.normal(KEY, (width,)))

    def norm(x):
        return rms_norm(1e-5, jnp.float32).apply({"params": {"scale": block_scale}}, x)

    residual = module.apply({"params": stem}, latent, action)
    embed = functools.partial(gpu_dense.embed, classes=classes, eps=(1e-6, 1e-5), interpret=True)
    mine = jax.jit(embed)(latent, action, stem, block_scale)
    close(mine[0], residual, jnp.float32)
    close(mine[1], norm(residual), dtype)

    update = jax.random.normal(jax.random.key(1), residual.shape).astype(dtype)
    add = functools.partial(gpu_dense.add, eps=1e-5, interpret=True)
    mine = jax.jit(add)(residual, update, block_scale)
    total = residual + update.astype(jnp.float32)
    np.testing.assert_array_equal(mine[0], total)
    close(mine[1], norm(total), dtype)
    assert mine[0].dtype == jnp.float32 and mine[1].dtype == dtype


@pytest.mark.parametrize(
    ("config", "classes", "dtype", "serves"),
    [
        (preset("xs").agent.world_model.backbone, 32, jnp.bfloat16, True),
        (preset("s").agent.world_model.backbone, 32, jnp.bfloat16, True),
        (preset("xs").agent.world_model.backbone, 32, jnp.float32, False),
        (BackboneConfig(width=96, head_dim=16), 32, jnp.bfloat16, False),
        (BackboneConfig(width=32, head_dim=16, state_dim=24), 32, jnp.bfloat16, False),
    ],
)
def test_serves_what_it_was_made_for(monkeypatch, config, classes, dtype, serves):
    assert not gpu_rollout.serves(config, dtype, 1024, classes)  # this is a CPU
    monkeypatch.setattr(gpu_rollout.gpu_convolution, "available", lambda: True)
    assert gpu_rollout.serves(config, dtype, 1024, classes) == serves


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_everything_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(gpu_rollout.gpu_convolution, "available", lambda: True)
    config, dtype = preset("xs").agent.world_model.backbone, jnp.bfloat16
    backbone = mamba2.Mamba2Backbone(config, 18, dtype)

    def run(latent, action):
        variables = jax.eval_shape(backbone.init, KEY, latent, action)
        variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables)
        features, window = backbone.apply(variables, latent, action, horizon=L, classes=32, method="open_window")
        assert isinstance(window, gpu_rollout.GpuWindow)
        feature, _ = backbone.apply(variables, latent[:, 0], action[:, 0], window, method="step")
        assert feature.dtype == features.dtype == jnp.float32
        return features, feature

    text = lower_for_cuda(run, jax.ShapeDtypeStruct((32, 8, 1024), dtype), jax.ShapeDtypeStruct((32, 8), jnp.int32))
    for name in ("mixer_context", "mixer_step", "stem", "add_and_norm"):
        assert name in text


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_calls_of_one_size_are_lowered_once():
    """Tracing and lowering is most of the time before the first update if everything is compiled already."""

    def often(residual, update, scale):
        for _ in range(4):
            residual, update = gpu_dense.add(residual, update, scale, eps=1e-5)
        return residual, update

    rows = jax.ShapeDtypeStruct((B, 32), jnp.float32)
    text = lower_for_cuda(often, rows, rows, jax.ShapeDtypeStruct((32,), jnp.float32))
    called = re.findall(r" call @(add\w*)\(", text)
    # What the first call is given differs in type: it does not know of the mesh that `lower_for_cuda` needs.
    assert len(called) == 4 and len(set(called[1:])) == 1
    assert text.count("custom_call @__gpu$xla.gpu.triton") == len(set(called))
