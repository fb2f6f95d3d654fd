"""The Mamba-1 and transformer backbones against vectors of the released code, in float64; shapes and initial values."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import backbones, distributions, interop, vae, world_model
from drama_jax.backbones import mamba, torch_names
from drama_jax.config import AutoencoderConfig, BackboneConfig, WorldModelConfig
from drama_jax.replay import Batch
from tests.tools import assert_trees_close, named

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MIXER = BackboneConfig(name="mamba", width=64, chunk_size=8)
MODELS = {
    "mamba": MIXER,
    "transformer": BackboneConfig(name="transformer", width=64, head_dim=16, max_length=16),
}
PREFIX = {"mamba": "Mamba/{}/backbone.", "transformer": "Transformer/{}/"}
COUNTS = {"mamba": {18: 3_925_504, 4: 3_918_336}, "transformer": {18: 5_065_728, 4: 5_058_560}}
both = pytest.mark.parametrize("name", MODELS)


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


# --- one Mamba-1 mixer -------------------------------------------------------------------------------------------


def test_mixer_matches_golden(golden, x64):
    data = golden("mamba1_block")
    module = mamba.MambaMixer(MIXER, jnp.float64)
    params = wide(torch_names.mixer_from_torch(named(data, "param/"), "mamba"))
    start = mamba.initial_state(MIXER, jnp.float64, 2)

    @jax.jit
    def run(params, u, w):
        def loss(params, u):
            out, _ = module.apply({"params": params}, u, start)
            return jnp.sum(out * w), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, u)

    (gradients, grad_u), out = run(params, *wide((data["u"], data["w"])))
    np.testing.assert_allclose(out, data["out"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_u, data["grad_u"], rtol=1e-9, atol=1e-12)
    assert_trees_close(gradients, torch_names.mixer_from_torch(named(data, "grad/"), "mamba"), rtol=1e-9)


@pytest.mark.parametrize("prefill", [0, 8])
def test_mixer_prefill_then_steps_match_golden(golden, x64, prefill):
    data = golden("mamba1_block")
    module = mamba.MambaMixer(MIXER, jnp.float64)
    variables = {"params": wide(torch_names.mixer_from_torch(named(data, "param/"), "mamba"))}
    state, out = mamba.initial_state(MIXER, jnp.float64, 2), []

    def check(conv, ssm):
        # The released conv state holds one input more than the next step needs.
        np.testing.assert_allclose(state.conv, np.moveaxis(data[conv], 1, 2)[:, 1:], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.ssm, data[ssm], rtol=1e-9, atol=1e-12)

    if prefill:
        y, state = jax.jit(module.apply)(variables, data["u"][:, :prefill], state)
        out = list(jnp.moveaxis(y, 1, 0))
        check(f"prefill{prefill}_conv_state", f"prefill{prefill}_ssm_state")
    step = jax.jit(lambda u, state: module.apply(variables, u, state, method="step"))
    for t in range(prefill, 20):
        y, state = step(data["u"][:, t], state)
        out.append(y)
    expected = data[f"prefill{prefill}_then_steps_out"] if prefill else data["steps_out"]
    np.testing.assert_allclose(jnp.stack(out, 1), expected, rtol=1e-9, atol=1e-12)
    check("final_conv_state", "final_ssm_state")


# --- whole sequence models ---------------------------------------------------------------------------------------


def released(data, name, what):
    return torch_names.from_torch(data, num_layers=2, prefix=PREFIX[name].format(what), backbone=name)


@both
def test_sequence_model_matches_golden(golden, x64, name):
    data = golden("sequence_model_old")
    action = data["action"].astype(np.int32)
    module = backbones.make(MODELS[name], 5, jnp.float64)

    @jax.jit
    def run(params, latent):
        def loss(params, latent):
            out, _ = module.apply({"params": params}, latent, action)
            return jnp.sum(out * jnp.asarray(data["w"], jnp.float64)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, latent)

    (gradients, grad_latent), out = run(wide(released(data, name, "param")), jnp.asarray(data["stoch"], jnp.float64))
    theirs = PREFIX[name].partition("/")[0]
    np.testing.assert_allclose(out, data[f"{theirs}/out"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_latent, data[f"{theirs}/grad_stoch"], rtol=1e-9, atol=1e-11)
    assert_trees_close(gradients, released(data, name, "grad"), rtol=2e-7)  # stored in float32


def test_transformer_decodes_as_golden(golden, x64):
    """The released variant's steps with a cache: five in parallel, the others in a window one by one."""
    data = golden("sequence_model_old")
    module = backbones.make(MODELS["transformer"], 5, jnp.float64)
    variables = {"params": wide(released(data, "transformer", "param"))}
    latent, action = jnp.asarray(data["stoch"], jnp.float64), data["action"].astype(np.int32)
    start = jax.jit(lambda *past: module.apply(variables, *past, horizon=7, method="open_window"))
    prefix, window = start(latent[:, :5], action[:, :5])
    out = list(jnp.moveaxis(prefix, 1, 0))
    step = jax.jit(lambda z, a, window: module.apply(variables, z, a, window, method="step"))
    for t in range(5, 12):
        feature, window = step(latent[:, t], action[:, t], window)
        out.append(feature)
    np.testing.assert_allclose(jnp.stack(out, 1), data["Transformer/decode_out"], rtol=1e-9, atol=1e-12)


@both
def test_shapes_are_the_released_model_s(name):
    shapes = json.loads((GOLDEN / "param_shapes_XS_old.json").read_text())
    for num_actions, count in COUNTS[name].items():
        arrays = shapes[f"action_dim={num_actions},backbone={name.capitalize()}"]["world_model"]
        ours = interop.from_torch({key: np.zeros(shape, np.int8) for key, shape in arrays.items()})["params"]
        config = WorldModelConfig(backbone=BackboneConfig(name=name), compute_dtype="float32")
        made = jax.eval_shape(lambda n=num_actions, c=config: world_model.init(jax.random.key(0), c, n)).params
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, made)
        assert sum(leaf.size for leaf in jax.tree.leaves(made["backbone"])) == count


@both
def test_torch_names_round_trip(golden, name):
    data = golden("sequence_model_old")
    prefix = PREFIX[name].format("param")
    back = torch_names.to_torch(released(data, name, "param"), num_layers=2, prefix=prefix, backbone=name)
    assert set(back) == {key for key in data if key.startswith(prefix)}
    for key, value in back.items():
        np.testing.assert_array_equal(value, data[key])


# --- in the world model ------------------------------------------------------------------------------------------


ACTIONS = 4
MODEL = WorldModelConfig(
    autoencoder=AutoencoderConfig(depths=(4, 8, 12, 16, 16), categoricals=8, classes=8),
    backbone=BackboneConfig(width=64, head_dim=16),
    head_units=32,
    free_bits_each=False,
    compute_dtype="float64",
)


@jax.jit
def autoencode(params, frames, gumbel):
    """What the world model computes before its sequence model; compiled once for both."""
    config, lead, dtype = MODEL.autoencoder, frames.shape[:2], jnp.float64
    stats = jax.eval_shape(lambda: vae.init(jax.random.key(0), config, dtype))[1]
    stats = jax.tree.map_with_path(lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var"), dtype), stats)
    phases = vae.frames_to_phases(frames.reshape(-1, *config.image_shape), dtype)
    embedding, _ = vae.encode(config, params, stats, phases, train=True, dtype=dtype)
    posterior = vae.posterior(config, params, embedding, dtype=dtype).reshape(*lead, 8, 8)
    latent = distributions.straight_through(posterior, gumbel).reshape(*lead, -1)
    frames, _ = vae.decode(config, params, stats, latent.reshape(-1, 64), train=True, dtype=dtype)
    nothing = jnp.zeros(())
    return world_model.Forward(
        embedding=nothing,
        posterior=posterior,
        latent=latent,
        reconstruction=frames.reshape(*lead, *frames.shape[1:]),
        features=nothing,
        prior=nothing,
        reward_logits=nothing,
        termination_logits=nothing,
    )


@both
def test_world_model_gradient_matches_golden(golden, x64, name):
    """Losses and the sequence model's gradients of an update of the released world model."""
    theirs = name.capitalize()
    data = golden("world_model_backbones_old")
    config = dataclasses.replace(MODEL, backbone=BackboneConfig(name=name, width=64, head_dim=16, chunk_size=4))
    batch = Batch(
        frames=jnp.asarray(data["obs"]),
        actions=jnp.asarray(data["action"], jnp.int32),
        rewards=jnp.asarray(data["reward"], jnp.float32),
        terminals=jnp.asarray(data["termination"] > 0),
        firsts=jnp.zeros(data["action"].shape, bool),
    )
    params = wide(interop.from_torch(named(data, f"{theirs}/param0/"))["params"])
    features = params.pop("backbone")
    seen = autoencode(params, batch.frames, jnp.asarray(data[f"{theirs}/gumbel"], jnp.float64))
    index = seen.latent.reshape(2, 6, 8, 8).argmax(axis=-1)
    np.testing.assert_array_equal(index, data[f"{theirs}/sample_index"])

    @jax.jit
    def run(backbone, params, seen):
        def objective(backbone):
            features, _ = world_model.observe(
                config, {"backbone": backbone}, seen.latent, batch.actions, num_actions=ACTIONS
            )
            out = seen.replace(
                features=features,
                prior=world_model.prior(config, params, features),
                reward_logits=world_model.reward_logits(config, params, features),
                termination_logits=world_model.termination_logits(config, params, features),
            )
            return world_model.losses(config, out, batch, None)

        return jax.value_and_grad(objective, has_aux=True)(backbone)

    (_, terms), grads = run(features, params, seen)
    for loss in ("reconstruction", "reward", "termination", "dynamics", "representation", "total"):
        np.testing.assert_allclose(terms[f"{loss}_loss"], data[f"{theirs}/{loss}_loss"], rtol=1e-8, err_msg=loss)
    np.testing.assert_allclose(terms["dynamics_kl"], data[f"{theirs}/dynamics_real_kl_div"], rtol=1e-8)
    expected = interop.from_torch(named(data, f"{theirs}/grad/"))["params"]
    assert_trees_close({"backbone": grads}, expected, rtol=1e-6)


def test_initialisation_has_the_released_ranges():
    def init(module, *arguments):
        params = jax.jit(lambda key: module.init(key, *arguments, method="step"))(jax.random.key(1))["params"]
        return jax.tree.map(np.asarray, params)

    config = BackboneConfig(name="mamba", width=128, state_dim=5)
    mixer = init(
        mamba.MambaMixer(config, jnp.float32), jnp.zeros((1, 128)), mamba.initial_state(config, jnp.float32, 1)
    )
    transformer = backbones.make(BackboneConfig(name="transformer", width=128, num_layers=1), 4, jnp.float32)
    other = init(transformer, jnp.zeros((1, 124)), jnp.zeros((1,), jnp.int32), transformer.initial_state(1))
    block = other["layers_0"]
    for value, limit in (
        (mixer["in_proj"]["kernel"], 1 / np.sqrt(128)),
        (mixer["x_proj"]["kernel"], 1 / np.sqrt(256)),
        (mixer["dt_proj"]["kernel"], 1 / np.sqrt(8)),
        (mixer["out_proj"]["kernel"], 1 / np.sqrt(256) / np.sqrt(2)),
        (other["stem"]["kernel"], 1 / np.sqrt(128)),
        (block["query"]["kernel"], 1 / np.sqrt(128)),
        (block["project"]["kernel"], 1 / np.sqrt(256)),
        (block["project"]["bias"], 1 / np.sqrt(256)),
        (block["hidden"]["bias"], 1 / np.sqrt(128)),
    ):
        assert 0.9 * limit < np.abs(value).max() <= limit
        assert abs(float(value.std()) - limit / np.sqrt(3)) < 0.06 * limit
    np.testing.assert_allclose(np.exp(mixer["A_log"]), np.tile(np.arange(1, 6), (256, 1)), rtol=1e-6)
    step_size = np.log1p(np.exp(mixer["dt_bias"]))
    assert 0.99e-3 < step_size.min() < 3e-3 and 0.04 < step_size.max() < 0.1001
    assert bool((mixer["D"] == 1).all()) and abs(float(other["positions"].std()) - 1) < 0.02
