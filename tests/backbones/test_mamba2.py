"""The Mamba-2 backbone: golden vectors, parallel form == steps, resets, initialisation, error messages."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import backbones
from drama_jax.backbones import torch_names
from drama_jax.backbones.mamba2 import Mamba2LayerState, Mamba2Mixer
from drama_jax.config import BackboneConfig, ConfigError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMALL = BackboneConfig(width=64, head_dim=16, state_dim=16, chunk_size=8)
TINY = BackboneConfig(width=16, head_dim=8, state_dim=4, chunk_size=4)


def _named(data, prefix):
    return {key[len(prefix) :]: data[key] for key in data if key.startswith(prefix)}


def _to(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _assert_close(actual, expected, relative):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=relative * np.abs(expected).max())


# --- one mixer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mixer(golden, x64):
    data = golden("mamba2_block")
    module = Mamba2Mixer(SMALL, jnp.float64)
    params = _to(torch_names.mixer_from_torch(_named(data, "param/")), jnp.float64)
    state = Mamba2LayerState(conv=jnp.zeros((2, 3, 160), jnp.float64), ssm=jnp.zeros((2, 8, 16, 16), jnp.float64))
    return data, module, params, state


def test_mixer_output_and_gradients_match_golden(mixer):
    data, module, params, state = mixer
    w = jnp.asarray(data["w"], jnp.float64)

    @jax.jit
    def run(params, u):
        def loss(params, u):
            out, _ = module.apply({"params": params}, u, state)
            return jnp.sum(out * w), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, u)

    (gradients, grad_u), out = run(params, jnp.asarray(data["u"], jnp.float64))
    np.testing.assert_allclose(out, data["out"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_u, data["grad_u"], rtol=1e-9, atol=1e-12)
    expected = torch_names.mixer_from_torch(_named(data, "grad/"))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-11), gradients, expected)


@pytest.mark.parametrize("prefill", [0, 2, 8, 20])
def test_mixer_prefill_then_steps_match_golden(mixer, prefill):
    data, module, params, state = mixer
    u = jnp.asarray(data["u"], jnp.float64)
    out = []
    if prefill:
        y, state = jax.jit(module.apply)({"params": params}, u[:, :prefill], state)
        out = list(jnp.moveaxis(y, 1, 0))
        # The released conv state holds one input more than the next step needs.
        newest = np.moveaxis(data[f"prefill{prefill}_conv_state"], 1, 2)[:, 1:]
        np.testing.assert_allclose(state.conv, newest, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.ssm, data[f"prefill{prefill}_ssm_state"], rtol=1e-9, atol=1e-12)
    step = jax.jit(lambda u_t, state: module.apply({"params": params}, u_t, state, method="step"))
    for t in range(prefill, 20):
        y_t, state = step(u[:, t], state)
        out.append(y_t)
    expected = data[f"prefill{prefill}_then_steps_out"] if prefill else data["steps_out"]
    np.testing.assert_allclose(jnp.stack(out, 1), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.conv, np.moveaxis(data["final_conv_state"], 1, 2)[:, 1:], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.ssm, data["final_ssm_state"], rtol=1e-9, atol=1e-12)


# --- the whole sequence model --------------------------------------------------------------------------------------


def _whole_model(golden):
    data = golden("sequence_model_old")
    params = torch_names.from_torch(data, num_layers=2, prefix="Mamba2/param/backbone.")
    return data, params, np.asarray(data["action"]).astype(np.int32)


def test_sequence_model_matches_golden(golden, x64):
    data, params, action = _whole_model(golden)
    params = _to(params, jnp.float64)
    module = backbones.make(SMALL, 5, jnp.float64)

    @jax.jit
    def run(params, latent):
        def loss(params, latent):
            out, _ = module.apply({"params": params}, latent, action)
            return jnp.sum(out * jnp.asarray(data["w"], jnp.float64)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, latent)

    (gradients, grad_latent), out = run(params, jnp.asarray(data["stoch"], jnp.float64))
    np.testing.assert_allclose(out, data["Mamba2/out"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_latent, data["Mamba2/grad_stoch"], rtol=1e-9, atol=1e-11)
    expected = torch_names.from_torch(data, num_layers=2, prefix="Mamba2/grad/backbone.")
    jax.tree.map(lambda a, e: _assert_close(a, e, 2e-7), gradients, expected)


def test_sequence_model_decodes_as_golden(golden, x64):
    data, params, action = _whole_model(golden)
    variables = {"params": _to(params, jnp.float64)}
    module = backbones.make(SMALL, 5, jnp.float64)
    latent = jnp.asarray(data["stoch"], jnp.float64)
    prefix, state = jax.jit(module.apply)(variables, latent[:, :5], action[:, :5])
    out = list(jnp.moveaxis(prefix, 1, 0))
    step = jax.jit(lambda z, a, state: module.apply(variables, z, a, state, method="step"))
    for t in range(5, 12):
        feature, state = step(latent[:, t], action[:, t], state)
        out.append(feature)
    np.testing.assert_allclose(jnp.stack(out, 1), data["Mamba2/decode_out"], rtol=1e-9, atol=1e-12)


def test_sequence_model_float32(golden):
    data, params, action = _whole_model(golden)
    module = backbones.make(SMALL, 5, jnp.float32)
    out, _ = jax.jit(module.apply)({"params": _to(params, jnp.float32)}, jnp.asarray(data["stoch"]), action)
    assert out.dtype == jnp.float32
    _assert_close(out, data["Mamba2/out"], 1e-5)


def test_sequence_model_bfloat16(golden):
    data, params, action = _whole_model(golden)
    module = backbones.make(SMALL, 5, jnp.bfloat16)
    variables = {"params": _to(params, jnp.float32)}
    latent = jnp.asarray(data["stoch"], jnp.bfloat16)
    out, state = jax.jit(module.apply)(variables, latent, action)
    assert out.dtype == jnp.float32
    assert {layer.ssm.dtype for layer in state.layers} == {np.dtype("float32")}
    assert {layer.conv.dtype for layer in state.layers} == {np.dtype(jnp.bfloat16)}
    _assert_close(out, data["Mamba2/out"], 3e-2)


def test_torch_names_cover_the_released_model_both_ways():
    shapes = json.loads((GOLDEN / "param_shapes_XS_old.json").read_text())
    config = BackboneConfig()
    for num_actions, count in ((18, 3_743_648), (4, 3_736_480)):
        released = shapes[f"action_dim={num_actions},backbone=Mamba2"]["world_model"]
        arrays = {name: np.zeros(shape, np.float32) for name, shape in released.items()}
        ours = torch_names.from_torch(arrays, num_layers=2)
        module = backbones.make(config, num_actions, jnp.float32)
        made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 1024)), jnp.zeros((1, 2), jnp.int32))[
            "params"
        ]
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, made)
        assert sum(leaf.size for leaf in jax.tree.leaves(made)) == count


def test_torch_names_round_trip(golden):
    data, params, _ = _whole_model(golden)
    back = torch_names.to_torch(params, num_layers=2, prefix="Mamba2/param/backbone.")
    assert len(back) == 22
    for name, value in back.items():
        np.testing.assert_array_equal(value, data[name])


def test_torch_names_report_missing_and_unknown(golden):
    data = dict(golden("sequence_model_old"))
    data["Mamba2/param/backbone.layers.0.mixer.rotary"] = data.pop("Mamba2/param/backbone.layers.0.mixer.D")
    with pytest.raises(
        ValueError, match=r"missing \['layers.0.mixer.D'\], not part of the model \['layers.0.mixer.rot"
    ):
        torch_names.from_torch(data, num_layers=2, prefix="Mamba2/param/backbone.")


# --- parallel form, steps and resets -------------------------------------------------------------------------------


MODULE = backbones.make(TINY, 3, jnp.float64)


@jax.jit
def _init(key, latent, action):
    # Larger than initial weights: every path must matter.
    return jax.tree.map(lambda leaf: leaf * 2 + 0.1, MODULE.init(key, latent, action))


@jax.jit
def _apply(variables, latent, action, state, segment_ids):
    return MODULE.apply(variables, latent, action, state=state, segment_ids=segment_ids)


@jax.jit
def _step(variables, latent, action, state):
    return MODULE.apply(variables, latent, action, state, method="step")


def _loss(variables, latent, action):
    # Weighted: the final norm makes a plain sum of squares nearly constant.
    out, _ = MODULE.apply(variables, latent, action)
    return jnp.sum(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape) * out)


_gradient = jax.jit(jax.grad(_loss))


@pytest.fixture
def tiny(x64):
    rng = np.random.default_rng(0)
    latent = jnp.asarray(rng.normal(size=(2, 11, 6)))
    action = jnp.asarray(rng.integers(0, 3, (2, 11)), jnp.int32)
    return _init(jax.random.key(0), latent, action), latent, action


def _by_steps(variables, latent, action, is_first):
    """Step by step, with the state zeroed before each first step."""
    state, out = MODULE.initial_state(latent.shape[0]), []
    for t in range(latent.shape[1]):
        keep = ~jnp.asarray(is_first[:, t])
        state = jax.tree.map(lambda s, k=keep: jnp.where(k.reshape(-1, *[1] * (s.ndim - 1)), s, 0), state)
        feature, state = _step(variables, latent[:, t], action[:, t], state)
        out.append(feature)
    return jnp.stack(out, 1), state


def _assert_trees_close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12), actual, expected)


@pytest.mark.parametrize("rows", [([], []), ([0], [4]), ([5, 6], [10]), (range(11), [0, 1, 3, 7, 8])])
def test_parallel_form_equals_steps_with_resets(tiny, rows):
    variables, latent, action = tiny
    is_first = np.zeros((2, 11), np.int32)
    for row, where in enumerate(rows):
        is_first[row, list(where)] = 1
    expected = _by_steps(variables, latent, action, is_first > 0)
    ids = jnp.cumsum(jnp.asarray(is_first), 1)
    actual = _apply(variables, latent, action, MODULE.initial_state(2), ids)
    _assert_trees_close(actual, expected)


@pytest.mark.parametrize("split", [2, 6])
def test_a_split_sequence_equals_the_whole(tiny, split):
    variables, latent, action = tiny
    is_first = jnp.zeros((2, 11), jnp.int32).at[0, 3].set(1).at[1, 6].set(1)
    state = MODULE.initial_state(2)
    whole, final = _apply(variables, latent, action, state, jnp.cumsum(is_first, 1))
    out = []
    for part in (slice(0, split), slice(split, None)):
        ids = jnp.cumsum(is_first[:, part], 1)
        features, state = _apply(variables, latent[:, part], action[:, part], state, ids)
        out.append(features)
    _assert_trees_close((jnp.concatenate(out, 1), state), (whole, final))


def test_no_state_and_no_segments_are_the_defaults(tiny):
    variables, latent, action = tiny
    given = _apply(variables, latent, action, MODULE.initial_state(2), jnp.zeros((2, 11), jnp.int32))
    _assert_trees_close(_apply(variables, latent, action, None, None), given)


def test_vmap_over_seeds_equals_a_loop(tiny):
    variables, latent, action = tiny
    both = [variables, jax.tree.map(lambda leaf: leaf * 0.9, variables)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    batched = jax.jit(jax.vmap(jax.grad(_loss), in_axes=(0, None, None)))(stacked, latent, action)
    for n, each in enumerate(both):
        _assert_trees_close(jax.tree.map(lambda leaf, n=n: leaf[n], batched), _gradient(each, latent, action))


def test_the_action_row_has_the_right_gradient(tiny):
    variables, latent, action = tiny
    direction = jax.tree.map(jnp.zeros_like, variables)
    direction["params"]["stem"]["kernel"] = direction["params"]["stem"]["kernel"].at[-2, ::3].set(1.0)
    gradient = _gradient(variables, latent, action)["params"]["stem"]["kernel"][-2, ::3].sum()
    loss = jax.jit(_loss)
    up, down = (jax.tree.map(lambda v, d, h=h: v + h * d, variables, direction) for h in (1e-5, -1e-5))
    difference = (loss(up, latent, action) - loss(down, latent, action)) / 2e-5
    assert abs(gradient) > 1e-2
    np.testing.assert_allclose(gradient, difference, rtol=1e-7)


def test_initialisation_has_the_released_ranges():
    module = backbones.make(BackboneConfig(width=128, head_dim=4), 4, jnp.float32)
    params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 2, 124)), jnp.zeros((1, 2), jnp.int32))["params"]
    mixer = params["layers_1"]["mixer"]
    for value, limit in (
        (params["stem"]["kernel"], 1 / np.sqrt(128)),
        (mixer["in_proj"]["kernel"], 1 / np.sqrt(128)),
        (mixer["out_proj"]["kernel"], 1 / np.sqrt(256) / np.sqrt(2)),
        (mixer["conv"]["kernel"], 0.5),
        (mixer["conv"]["bias"], 0.5),
    ):
        assert 0.98 * limit < jnp.abs(value).max() <= limit
        assert abs(float(value.std()) - limit / np.sqrt(3)) < 0.06 * limit
    step_size = jax.nn.softplus(mixer["dt_bias"])
    assert 0.99e-3 < step_size.min() < 3e-3 and 0.04 < step_size.max() < 0.1001
    decay = jnp.exp(mixer["A_log"])
    assert 1 <= decay.min() < 3 and 14 < decay.max() <= 16.001
    for ones in (mixer["D"], mixer["norm"]["scale"], params["norm_f"]["scale"], params["stem"]["norm"]["scale"]):
        assert bool((ones == 1).all())
    assert bool((params["stem"]["bias"] == 0).all())


@pytest.mark.parametrize(
    ("latent", "action", "message"),
    [
        (
            jnp.zeros((2, 3, 6)),
            jnp.zeros((2, 3, 3)),
            r"action must be integer \[B, T\], here \[2, 3\], got float32 \[2, 3, 3\]",
        ),
        (jnp.zeros((2, 6)), jnp.zeros((2,), jnp.int32), r"latent must be float \[B, T, S\]"),
        (jnp.zeros((2, 3, 6)), jnp.zeros((2, 3)), "action must be integer"),
    ],
)
def test_wrong_inputs_are_one_clear_line(latent, action, message):
    module = backbones.make(TINY, 3, jnp.float32)
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), latent, action)


def test_make_refuses_no_action():
    with pytest.raises(ConfigError, match="num_actions must be at least 1"):
        backbones.make(TINY, 0, jnp.float32)
