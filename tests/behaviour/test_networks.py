"""Sizes, names and initial values of actor and critic."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.behaviour import actor_critic, torch_names
from drama_jax.config import BehaviourConfig

SHAPES = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "param_shapes_XS_old.json").read_text())
CONFIG = BehaviourConfig(compute_dtype="float32")


def _state_shapes(num_actions):
    return jax.eval_shape(lambda key: actor_critic.init(key, CONFIG, 1536, num_actions), jax.random.key(0))


@pytest.mark.parametrize(("num_actions", "actor"), [(18, 530_450), (4, 526_852)])
def test_parameter_counts_of_the_released_model(num_actions, actor):
    params = _state_shapes(num_actions).params
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert counts == {"actor": actor, "critic": 1_444_607}
    released = SHAPES[f"action_dim={num_actions},backbone=Mamba2"]["counts"]
    assert counts == {name: released[name] for name in counts}


@pytest.mark.parametrize("num_actions", [18, 4])
def test_torch_names_cover_the_released_agent(num_actions):
    released = SHAPES[f"action_dim={num_actions},backbone=Mamba2"]["agent"]
    state = _state_shapes(num_actions)
    trees = {**state.params, "slow_critic": state.slow_critic}
    shapes = {}
    for network, tree in trees.items():
        mapping = torch_names.names(3, torch_names.ACTOR_OFFSET if network == "actor" else 0)
        assert len(jax.tree.leaves(tree)) == len(mapping)
        for (module, array), name in mapping.items():
            shapes[f"{network}.{name}"] = list(tree[module][array].shape[::-1])
    assert shapes == released


@pytest.mark.parametrize("offset", [0, torch_names.ACTOR_OFFSET])
def test_from_torch_transposes_kernels_and_finds_the_layers(offset):
    kernel, vector = np.arange(9.0).reshape(3, 3), np.arange(3.0)
    names = torch_names.names(2, offset)
    params = torch_names.from_torch({name: kernel if ours[1] == "kernel" else vector for ours, name in names.items()})
    assert sorted(params) == ["hidden_0", "hidden_1", "norm_0", "norm_1", "output"]
    np.testing.assert_array_equal(params["hidden_0"]["kernel"], kernel.T)
    np.testing.assert_array_equal(params["hidden_0"]["bias"], vector)


@pytest.mark.parametrize(("remove", "add"), [("2.scale", None), (None, "2.weight"), (None, "log_std")])
def test_from_torch_names_what_does_not_fit(remove, add):
    arrays = {name: np.zeros(2) for name in torch_names.names(2, 1).values()}
    if remove:
        del arrays[remove]
    if add:
        arrays[add] = np.zeros(2)
    with pytest.raises(ValueError, match=f"not known: {remove or add}"):
        torch_names.from_torch(arrays)


def test_initialisation():
    config = BehaviourConfig(actor_units=32, critic_units=48, compute_dtype="float32")
    state = jax.jit(actor_critic.init, static_argnums=(1, 2, 3))(jax.random.key(0), config, 64, 5)
    for params, units, outputs in ((state.params["actor"], 32, 5), (state.params["critic"], 48, 255)):
        for layer in ("hidden_0", "hidden_1", "hidden_2"):
            kernel = params[layer]["kernel"]
            np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(units), atol=1e-5)
            np.testing.assert_array_equal(params[layer]["bias"], 0)
        kernel = params["output"]["kernel"]
        singular = np.linalg.svd(kernel, compute_uv=False)
        np.testing.assert_allclose(singular, 1e-3 * np.ones(min(units, outputs)), rtol=1e-4)
        np.testing.assert_array_equal(params["output"]["bias"], 0)
        np.testing.assert_array_equal(params["norm_0"]["scale"], 1)
    jax.tree.map(np.testing.assert_array_equal, state.slow_critic, state.params["critic"])
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves), "a donated state shares no buffer"
    logits = actor_critic.policy_logits(config, state.params, state.normaliser, jnp.ones((3, 64)))
    assert np.abs(logits).max() < 0.02
