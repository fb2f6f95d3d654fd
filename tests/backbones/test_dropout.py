"""Dropout of the transformer: in world-model updates only, of the right share, and nothing at rate 0."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import agent, backbones, world_model
from drama_jax.backbones.transformer_block import TransformerBlock
from drama_jax.config import BackboneConfig, ConfigError, preset

SIZES = {"name": "transformer", "width": 8, "head_dim": 4, "num_layers": 2, "max_length": 6}
LATENT = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
ACTION = np.arange(12, dtype=np.int32).reshape(2, 6) % 3
KEY = jax.random.key(1)


@functools.cache
def run(**rates):
    """(parameters, latent, key or None) -> features; compiled."""
    module = backbones.make(BackboneConfig(**SIZES, **rates), 3, jnp.float32)

    def features(variables, latent, key=None):
        return module.apply(variables, latent, ACTION, rngs={} if key is None else {"dropout": key})[0]

    return jax.jit(features)


@pytest.fixture(scope="module")
def variables():
    module = backbones.make(BackboneConfig(**SIZES), 3, jnp.float32)
    return jax.jit(module.init)(jax.random.key(0), LATENT, ACTION)


def test_without_a_key_or_a_rate_nothing_is_dropped(variables):
    expected = run()(variables, LATENT)
    np.testing.assert_array_equal(run()(variables, LATENT, KEY), expected)
    np.testing.assert_array_equal(run(dropout=0.5, attention_dropout=0.5)(variables, LATENT), expected)


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"attention_dropout": 0.5}])
def test_each_rate_moves_the_features_by_its_key(variables, rates):
    one = run(**rates)(variables, LATENT, KEY)
    np.testing.assert_array_equal(run(**rates)(variables, LATENT, KEY), one)
    for other in (run(**rates)(variables, LATENT, jax.random.key(2)), run()(variables, LATENT)):
        assert np.abs(one - other).max(axis=(1, 2)).min() > 0.01  # in every row
    assert np.isfinite(one).all()


def test_a_share_is_dropped_and_the_rest_makes_up_for_it():
    block = TransformerBlock(BackboneConfig(**SIZES), jnp.float32)
    x = 1 + np.arange(20_000, dtype=np.float32)

    def both(module, x):
        return jnp.stack([module._drop(x, 0.3) for _ in range(2)])

    def drop(x):
        twice = block.apply({}, x, rngs={"dropout": KEY}, method=both)
        return twice.sum(), twice

    gradient, (one, two) = jax.grad(drop, has_aux=True)(x)
    for dropped in (one, two):
        kept = dropped != 0
        assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / x.size)
        np.testing.assert_allclose(dropped[kept], x[kept] / 0.7, rtol=1e-6)
    assert 0.4 < np.mean((one != 0) == (two != 0)) < 0.7  # 0.58: drawn anew at every call
    np.testing.assert_allclose(gradient, (np.asarray([one, two]) != 0).sum(axis=0) / 0.7, rtol=1e-6)


def tiny(**rates):
    """An agent of the preset, with dropout, and a state of it that is not made."""
    config = preset("tiny", "transformer").agent
    backbone = dataclasses.replace(config.world_model.backbone, **rates)
    config = dataclasses.replace(config, world_model=dataclasses.replace(config.world_model, backbone=backbone))
    return jax.eval_shape(lambda key: agent.init(key, config, 4), jax.random.key(0))


def test_only_world_model_updates_drop_anything():
    states = tiny(), tiny(dropout=0.1, attention_dropout=0.1)

    def programs(function, *arguments):
        """What each agent does, traced."""
        return [str(jax.make_jaxpr(function)(state, *arguments)) for state in states]

    without, dropping = programs(lambda state: agent.train_world_model(state)[0])
    assert dropping.count("random_bits") > without.count("random_bits") > 0
    without, dropping = programs(lambda state: agent.train_behaviour(state)[0])
    assert without == dropping
    acting = jax.eval_shape(lambda state: agent.initial_acting(state, 2), states[0])
    frames, first = jnp.zeros((2, 32, 32, 3), jnp.uint8), jnp.zeros(2, bool)
    without, dropping = programs(lambda state, *rest: agent.act(state, *rest), acting, frames, KEY, first)
    assert without == dropping


def test_an_update_needs_its_key():
    state = tiny(dropout=0.1)
    message = "world_model.update: dropout_key must be one PRNG key, as from jax.random.key"
    with pytest.raises(TypeError, match=message):
        world_model.update(state.config.world_model, state.world_model, None, None, None, num_actions=4)


def test_the_released_rates_are_those_of_reference():
    for name, rate in (("reference", 0.1), ("xs", 0.0), ("s", 0.0), ("tiny", 0.0)):
        backbone = preset(name, "transformer").agent.world_model.backbone
        assert (backbone.dropout, backbone.attention_dropout) == (rate, rate)
        assert backbone.has_dropout == bool(rate) and not preset(name).agent.world_model.backbone.has_dropout
    assert not BackboneConfig(dropout=0.1).has_dropout  # of mamba2


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_that_cannot_be_is_one_line(rate):
    with pytest.raises(ConfigError, match=rf"BackboneConfig.attention_dropout must lie in \[0, 1\), got {rate}"):
        BackboneConfig(attention_dropout=rate)
