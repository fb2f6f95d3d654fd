"""The autoencoder against the released PyTorch modules (golden `vae`), and its own invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import distributions, interop, vae
from drama_jax.config import AutoencoderConfig
from drama_jax.nn import depth_to_space, space_to_depth
from tests.tools import assert_trees_close, named

LAYOUTS = {
    "m12344": AutoencoderConfig(depths=(4, 8, 12, 16, 16), categoricals=8, classes=8),
    "m1248": AutoencoderConfig(depths=(2, 4, 8, 16), categoricals=8, classes=8),
}


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x, jnp.float64), -3, -1)


@pytest.fixture(params=LAYOUTS)
def case(request, golden, x64):
    tag = request.param
    data = {k.removeprefix(f"{tag}/"): v for k, v in golden("vae").items() if k.startswith(tag)}
    widen = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)  # noqa: E731
    variables = widen(interop.from_torch(named(data, "param/")))
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), LAYOUTS[tag], jnp.float64)[1])
    fresh = jax.tree.map_with_path(lambda path, a: jnp.full(a.shape, float(path[-1].key == "var"), a.dtype), shapes)
    return LAYOUTS[tag], data, variables["params"], fresh


def run(config, data, params, batch_stats, mode):
    """Loss as the golden file defines it, and every intermediate."""
    dtype, train = jnp.float64, mode == "train"
    frames = data["obs"].reshape(-1, *config.image_shape)
    embedding, stats = vae.encode(
        config, params, batch_stats, vae.frames_to_phases(frames, dtype), train=train, dtype=dtype
    )
    posterior = vae.posterior(config, params, embedding, dtype=dtype).reshape(2, 2, 8, 8)
    latent = distributions.straight_through(posterior, jnp.asarray(data[f"{mode}/gumbel"], dtype))
    phases, stats = vae.decode(config, params, stats, latent.reshape(4, -1), train=train, dtype=dtype)
    head = vae.latent_head(data["hidden"].shape[-1], config, dtype)
    hidden = jnp.asarray(data["hidden"], dtype)
    prior = vae.mixed_logits(config, head.apply({"params": params["prior_head"]}, hidden))
    weight = space_to_depth(channels_last(data["w_obs_seed6"]).reshape(4, *config.image_shape))
    loss = jnp.sum(phases * weight) + jnp.sum((posterior + prior) * jnp.asarray(data["w_logits"], dtype))
    return loss, (embedding, posterior, latent, phases, prior, stats)


def check(config, data, mode, loss, out):
    embedding, posterior, latent, phases, prior, _ = out
    size, depth = config.map_size, config.depths[-1]
    ours = embedding.reshape(2, 2, size, size, depth).transpose(0, 1, 4, 2, 3).reshape(2, 2, -1)
    np.testing.assert_allclose(ours, data[f"{mode}/embedding"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(posterior, data[f"{mode}/post_logits"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(prior, data[f"{mode}/prior_logits"], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(jnp.argmax(latent, axis=-1), data[f"{mode}/sample_index"])
    frames = jnp.moveaxis(depth_to_space(phases), -1, -3).reshape(data[f"{mode}/obs_hat"].shape)
    np.testing.assert_allclose(frames, data[f"{mode}/obs_hat"], rtol=0, atol=6e-8)  # stored in float32
    np.testing.assert_allclose(loss, data[f"{mode}/loss"], rtol=1e-9)


def test_training_mode_matches_released_code(case):
    config, data, params, fresh = case
    objective = jax.value_and_grad(lambda p: run(config, data, p, fresh, "train"), has_aux=True)
    (loss, out), grads = jax.jit(objective)(params)
    check(config, data, "train", loss, out)
    expected = interop.from_torch(named(data, "train/grad/"))["params"]
    # Biases in front of a batch norm: the released code stores rounding noise where the gradient is zero.
    assert_trees_close(grads, expected, rtol=2e-6, skip=("encoder/conv_", "decoder/conv_"), skip_leaf="bias")
    # ... ours is exactly zero, so that LaProp does not move them.
    for layer in (*grads["encoder"].values(), *(v for k, v in grads["decoder"].items() if k.startswith("conv_"))):
        np.testing.assert_array_equal(layer["bias"], 0.0)
    moved = interop.from_torch(named(data, "buffer_after_train/"))["batch_stats"]
    assert_trees_close(out[-1], moved, rtol=1e-9)


def test_evaluation_mode_matches_released_code(case):
    config, data, params, _ = case
    moved = interop.from_torch(named(data, "buffer_after_train/"))["batch_stats"]
    moved = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), moved)
    loss, out = jax.jit(lambda p, s: run(config, data, p, s, "eval"))(params, moved)
    check(config, data, "eval", loss, out)
    mode = jax.nn.one_hot(jnp.argmax(out[1], axis=-1), config.classes)
    np.testing.assert_array_equal(mode, data["decode_mode_sample"])
    assert_trees_close(out[-1], moved, rtol=0)  # evaluation moves nothing


def test_bfloat16_keeps_parameters_and_outputs_in_float32():
    config = AutoencoderConfig(image_size=16, depths=(4, 8, 8), categoricals=4, classes=4)

    def run():
        params, stats = vae.init(jax.random.key(0), config, jnp.bfloat16)
        phases = vae.frames_to_phases(jnp.full((2, 16, 16, 3), 255, jnp.uint8), jnp.bfloat16)
        embedding, stats = vae.encode(config, params, stats, phases, train=True, dtype=jnp.bfloat16)
        log_probs = vae.posterior(config, params, embedding, dtype=jnp.bfloat16)
        latent = jnp.ones((2, 16), jnp.bfloat16)
        frames, stats = vae.decode(config, params, stats, latent, train=True, dtype=jnp.bfloat16)
        return params, stats, embedding, log_probs, frames

    params, stats, embedding, log_probs, frames = jax.eval_shape(run)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype(jnp.float32)}
    assert embedding.dtype == jnp.bfloat16
    assert log_probs.dtype == jnp.float32
    assert frames.dtype == jnp.float32


def test_phases_of_bfloat16_are_pixels_over_255_rounded_once():
    """Divided in bfloat16, XLA for a GPU multiplied by a rounded reciprocal: every frame was 0.4 % too bright there."""
    frames = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    exact = jnp.asarray(np.arange(256) / 255, jnp.bfloat16)
    np.testing.assert_array_equal(np.sort(vae.frames_to_phases(frames, jnp.bfloat16), axis=None), exact)
    jaxpr = jax.make_jaxpr(lambda frames: vae.frames_to_phases(frames, jnp.bfloat16))(frames)
    (division,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "div")
    assert division.outvars[0].aval.dtype == jnp.float32
