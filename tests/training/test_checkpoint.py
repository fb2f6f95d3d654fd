"""Checkpoints through orbax."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drama_jax.config import ConfigError
from drama_jax.training import checkpoint


@flax.struct.dataclass
class State:
    """The kinds of leaves an agent's state has."""

    params: dict[str, Any]
    opt_state: Any
    key: jax.Array
    replay: Any
    num_actions: int = flax.struct.field(pytree_node=False)


def make_state(seed: int) -> State:
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (3, 4)), "bias": jnp.full(4, float(seed))}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return State(params, optimizer.init(params), jax.random.key(seed), {"frames": jnp.full((5, 2), seed, jnp.uint8)}, 4)


@pytest.fixture
def saved(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return tmp_path / "checkpoints"


def words(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if checkpoint._is_key(leaf) else leaf, tree)


def test_every_leaf_but_the_replay_comes_back(saved):
    fresh = make_state(0)
    restored = checkpoint.restore(saved, fresh)
    wanted = make_state(30).replace(replay=fresh.replay)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, wanted)
    jax.tree.map(np.testing.assert_array_equal, words(restored), words(wanted))


def test_the_last_two_are_kept_and_can_be_named(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["20", "30"]
    np.testing.assert_array_equal(checkpoint.restore(saved, make_state(0), step=20).params["dense"]["bias"], 20.0)


def test_the_replay_is_not_written(saved):
    weights = checkpoint.load_weights(saved)
    assert weights.get("replay") is None


def test_weights_load_without_a_template(saved):
    weights = checkpoint.load_weights(saved)
    assert isinstance(weights["params"]["dense"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(weights["params"]["dense"]["kernel"], make_state(30).params["dense"]["kernel"])


def test_what_was_saved_does_not_change_with_a_donated_buffer(tmp_path):
    state = make_state(1)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state)
    kernel = np.array(state.params["dense"]["kernel"])
    jax.block_until_ready(
        jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)(state.params)
    )
    checkpoints.close()
    np.testing.assert_array_equal(checkpoint.load_weights(tmp_path)["params"]["dense"]["kernel"], kernel)


def restore(directory):
    return checkpoint.restore(directory, make_state(0))


@pytest.mark.parametrize("load", [checkpoint.load_weights, restore])
def test_no_checkpoint_is_a_clear_error(tmp_path, load):
    with pytest.raises(ConfigError, match="no checkpoints at .*nowhere"):
        load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match=r"no checkpoint in .*there: none"):
        load(tmp_path)


def test_a_step_that_is_not_there_is_a_clear_error(saved):
    with pytest.raises(ConfigError, match=r"no checkpoint of step 10 in .*there: \[20, 30\]"):
        checkpoint.load_weights(saved, step=10)
