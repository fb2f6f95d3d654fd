"""RWKV-6: the recurrence against its definition, at decays of any strength, and the layer against the equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.backbones.rwkv import RwkvBlock, RwkvLayerState, TimeMixing
from drama_jax.backbones.wkv import wkv, wkv_step
from drama_jax.config import BackboneConfig

BATCH, TIME, HEADS, SIZE = 2, 11, 2, 3


def operands(scale, dtype):
    rng = np.random.default_rng(0)
    r, k, v = (rng.normal(size=(BATCH, TIME, HEADS, SIZE)) for _ in range(3))
    log_decay = -np.exp(scale * rng.normal(size=r.shape))
    u, state = rng.normal(size=(HEADS, SIZE)), rng.normal(size=(BATCH, HEADS, SIZE, SIZE))
    return [jnp.asarray(a, dtype) for a in (r, k, v, np.maximum(log_decay, -100), u, state)]


INDEX = np.asarray([[0] * 4 + [1] * 3 + [2] + [3] * 3, [1] * 5 + [2] * 6], np.int32)


def definition(r, k, v, log_decay, u, state):
    r, k, v, log_decay, u, state = (np.asarray(a, np.float64) for a in (r, k, v, log_decay, u, state))
    y, before = np.empty_like(v), np.zeros(BATCH, np.int32)
    state = state.copy()
    for t in range(TIME):
        state[INDEX[:, t] != before] = 0
        before = INDEX[:, t]
        added = k[:, t, ..., None] * v[:, t, :, None]
        y[:, t] = np.einsum("bhp,bhpn->bhn", r[:, t], state + u[..., None] * added)
        state = np.exp(log_decay[:, t])[..., None] * state + added
    return y, state


run = jax.jit(wkv, static_argnames="chunk_size")


@pytest.mark.parametrize(("scale", "chunk_size"), [(1.0, 1), (1.0, 4), (6.0, 4), (6.0, 16)])
def test_the_chunked_form_is_the_recurrence(x64, scale, chunk_size):
    arguments = operands(scale, jnp.float64)
    for actual, expected in zip(run(*arguments, index=INDEX, chunk_size=chunk_size), definition(*arguments)):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_float32_loses_no_digits_to_strong_decays(scale):
    """Decays from exp(-1e-7) to exp(-100) side by side: a difference of cumulative sums would be wrong by 1e-4."""
    arguments = operands(scale, jnp.float32)
    if scale > 1:
        assert arguments[3].min() == -100 and arguments[3].max() > -1e-5
    for actual, expected in zip(run(*arguments, index=INDEX, chunk_size=16), definition(*arguments)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_gradients_are_the_recurrence_s(x64):
    arguments = operands(2.0, jnp.float64)
    rng = np.random.default_rng(1)
    wy, ws = rng.normal(size=(BATCH, TIME, HEADS, SIZE)), rng.normal(size=(BATCH, HEADS, SIZE, SIZE))

    def by_steps(r, k, v, log_decay, u, state):
        changed = jnp.diff(INDEX, axis=1, prepend=0) > 0

        def body(state, now):
            *now, changed = now
            y, state = wkv_step(*now, u, jnp.where(changed[:, None, None, None], 0, state))
            return state, y

        now = (*(a.swapaxes(0, 1) for a in (r, k, v, log_decay)), changed.T)
        state, y = jax.lax.scan(body, state, now)
        return y.swapaxes(0, 1), state

    def gradient(form):
        def loss(arguments):
            y, state = form(*arguments)
            return jnp.sum(wy * y) + jnp.sum(ws * state)

        return jax.jit(jax.grad(loss))(arguments)

    expected = gradient(by_steps)
    actual = gradient(lambda *a: wkv(*a, index=INDEX, chunk_size=4))
    for a, e in zip(actual, expected):
        assert np.abs(e).max() > 0.1
        np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-11)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(x, scale, bias, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale + bias


def layer(p, config, x, state):
    """One step of one layer, written down from the equations of arXiv 2404.05892."""
    time, channel = p["time"], p["channel"]
    a = norm(x, **p["norm_time"], epsilon=1e-5)
    b = state.time_input
    low = np.tanh((a + (b - a) * time["shift"]) @ time["shift_down"]).reshape(len(x), 5, -1)
    shifted = {}
    for i, name in enumerate(("decay", "key", "value", "receptance", "gate")):
        mix = time[f"shift_{name}"] + low[:, i] @ time["shift_up"][i]
        shifted[name] = a + (b - a) * mix
    w = np.exp(-np.exp(time["decay"] + np.tanh(shifted["decay"] @ time["decay_down"]) @ time["decay_up"]))
    r, k, v, g = (shifted[name] @ time[name]["kernel"] for name in ("receptance", "key", "value", "gate"))
    r, k, v, w, u = (z.reshape(-1, config.num_heads, config.head_dim) for z in (r, k, v, w, time["u"]))
    added = k[..., None] * v[..., None, :]
    y = np.einsum("bhp,bhpn->bhn", r, state.wkv + u[..., None] * added)
    after = w[..., None] * state.wkv + added
    y = norm(y, 1.0, 0.0, 64e-5).reshape(len(x), -1) * time["head_scale"] + time["head_bias"]
    out = (y * g * sigmoid(g)) @ time["out"]["kernel"]
    c, d = norm(x + out, **p["norm_channel"], epsilon=1e-5), state.channel_input
    key, receptance = (c + (d - c) * channel[f"shift_{name}"] for name in ("key", "receptance"))
    hidden = np.maximum(key @ channel["key"]["kernel"], 0) ** 2
    update = sigmoid(receptance @ channel["receptance"]["kernel"]) * (hidden @ channel["value"]["kernel"])
    return out + update, RwkvLayerState(time_input=a, channel_input=c, wkv=after)


def test_a_layer_is_the_paper_s(x64):
    config = BackboneConfig(name="rwkv", width=12, head_dim=4, mixer_width=8, feedforward_width=10)
    module, rng = RwkvBlock(config, 1, jnp.float64), np.random.default_rng(0)
    state = RwkvLayerState(
        time_input=rng.normal(size=(2, 12)), channel_input=rng.normal(size=(2, 12)), wkv=rng.normal(size=(2, 2, 4, 4))
    )
    x = rng.normal(size=(2, 12))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, state, method="step"))
    variables = jax.tree.map(lambda leaf: 0.1 + 0.5 * rng.normal(size=leaf.shape), shapes)
    actual = jax.jit(lambda *a: module.apply(*a, method="step"))(variables, x, state)
    expected = layer(variables["params"], config, x, state)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12), actual, expected)


def test_a_fresh_layer_forgets_at_many_rates():
    """Decays of a step from exp(-exp(-6)) to exp(-exp(-1)), whatever the data; nor does the token shift yet."""
    config = BackboneConfig(name="rwkv", width=32, head_dim=16)
    module = TimeMixing(config, 0, jnp.float32)
    zeros = jnp.zeros((1, 32)), jnp.zeros((1, 32)), jnp.zeros((1, 2, 16, 16))
    init = jax.jit(lambda key: module.init(key, *zeros, method="step"))
    time = jax.tree.map(np.asarray, init(jax.random.key(0))["params"])
    np.testing.assert_allclose(time["decay"][[0, -1]], [-6, -1], rtol=1e-6)
    assert np.all(np.diff(time["decay"]) > 0)
    assert not time["shift_down"].any() and not time["decay_down"].any() and time["shift_up"].any()
    assert time["shift_key"][0] == 1 and 0 < time["shift_key"][-1] < 0.04
