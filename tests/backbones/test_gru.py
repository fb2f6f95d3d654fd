"""The GRU's cell against its equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.backbones.gru import GruBlock, GruLayerState
from drama_jax.config import BackboneConfig


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_step_is_that_of_the_equations(x64):
    config = BackboneConfig(name="gru", width=6, mixer_width=4)
    module, rng = GruBlock(config, jnp.float64), np.random.default_rng(0)
    state, x = GruLayerState(hidden=rng.normal(size=(2, 4))), rng.normal(size=(2, 6))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, state, method="step"))
    variables = jax.tree.map(lambda leaf: 0.1 + 0.5 * rng.normal(size=leaf.shape), shapes)
    out, after = jax.jit(lambda *a: module.apply(*a, method="step"))(variables, x, state)
    p = variables["params"]
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    gates = normed @ p["in_proj"]["kernel"] + state.hidden @ p["recurrent"]
    gates = (gates - gates.mean(axis=-1, keepdims=True)) / np.sqrt(gates.var(axis=-1, keepdims=True) + 1e-3)
    reset, candidate, update = np.split(gates * p["gate_scale"] + p["gate_bias"], 3, axis=-1)
    update = sigmoid(update - 1)
    hidden = update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * state.hidden
    np.testing.assert_allclose(after.hidden, hidden, rtol=1e-12)
    np.testing.assert_allclose(out, hidden @ p["out_proj"]["kernel"], rtol=1e-12)
