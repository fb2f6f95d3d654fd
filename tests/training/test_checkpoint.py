"""Checkpoints: what is written, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drama_jax.config import ConfigError
from drama_jax.training import arrays, checkpoint, files, manifest
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.replay_log import Row


@flax.struct.dataclass
class Model:
    """What training moves."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any


@flax.struct.dataclass
class State:
    """The kinds of leaves an agent's state has."""

    world_model: Model
    key: jax.Array
    replay: Any
    num_actions: int = flax.struct.field(pytree_node=False)


def make_state(seed: int) -> State:
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (3, 4)), "bias": jnp.full(4, float(seed))}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    model = Model(params, {"mean": jnp.zeros(2)}, optimizer.init(params))
    return State(model, jax.random.key(seed), None, 4)


def snapshot(step: int) -> Snapshot:
    device = arrays.to_host({"agent": make_state(step), "metrics": {"a/b": jnp.float32(step)}})
    return Snapshot(step, step - 1, device, {"number": step / 3}, {"environment": np.arange(step, dtype=np.uint8)})


def rows(start: int, stop: int) -> list[Row]:
    return [
        Row(
            np.full((1, 2, 2, 3), n, np.uint8),
            *(np.array([n]).astype(kind) for kind in (np.int32, np.float32, bool, bool)),
        )
        for n in range(start, stop)
    ]


@pytest.fixture
def saved(tmp_path):
    """A run directory with the checkpoints 20 and 30; 10 has been removed again."""
    checkpoints = Checkpoints(tmp_path, "a run", capacity=15)
    end = 0
    for step in (10, 20, 30):
        for row in rows(end, step - 1):
            checkpoints.add(row)
        end = step - 1
        checkpoints.save(snapshot(step))
    checkpoints.close()
    assert checkpoints.error is None
    return tmp_path


def words(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if arrays._is_key(leaf) else leaf, tree)


def test_every_leaf_comes_back_with_shape_and_type(saved):
    restored, wanted = checkpoint.restore(saved, make_state(0)), make_state(30)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, wanted)
    jax.tree.map(np.testing.assert_array_equal, words(restored), words(wanted))


def test_a_snapshot_comes_back_as_it_was(saved):
    found, segments = checkpoint.load(saved, "a run")
    wanted = snapshot(30)
    assert (found.step, found.end, found.header) == (30, 29, {"number": 10.0})
    assert found.device.keys() == wanted.device.keys() and found.host.keys() == wanted.host.keys()
    for name, array in (wanted.device | wanted.host).items():
        np.testing.assert_array_equal((found.device | found.host)[name], array)
    # A ring of 15 after 29 steps needs the steps from 14 on.
    assert [(segment.start, segment.stop) for segment in segments] == [(9, 19), (19, 29)]


def test_the_last_two_are_kept_with_their_segments(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["20", "30"]
    assert sorted(path.name for path in (saved / "replay").iterdir()) == ["0-9.npz", "19-29.npz", "9-19.npz"]
    restored = checkpoint.restore(saved, make_state(0), step=20)
    np.testing.assert_array_equal(restored.world_model.params["dense"]["bias"], 20.0)


def test_segments_that_no_checkpoint_needs_are_removed(saved):
    _, segments = checkpoint.load(saved, "a run")
    checkpoints = Checkpoints(saved, "a run", 15, segments)
    for row in rows(29, 39):
        checkpoints.add(row)
    checkpoints.save(snapshot(40))
    checkpoints.close()
    assert sorted(path.name for path in (saved / "replay").iterdir()) == ["19-29.npz", "29-39.npz", "9-19.npz"]


def test_a_step_saved_again_takes_the_place_of_the_first(saved):
    _, segments = checkpoint.load(saved, "a run")
    checkpoints = Checkpoints(saved, "a run", 15, segments)
    checkpoints.save(dataclasses.replace(snapshot(30), header={"number": 1}))
    checkpoints.close()
    assert checkpoints.error is None and checkpoint.load(saved, "a run")[0].header == {"number": 1}
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["20", "30"]


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/30"])
def test_weights_load_without_a_template(saved, part):
    weights = checkpoint.load_weights(saved / part)
    assert weights.keys() == {"world_model"} and weights["world_model"].keys() == {"params", "batch_stats"}
    kernel = weights["world_model"]["params"]["dense"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    np.testing.assert_array_equal(kernel, make_state(30).world_model.params["dense"]["kernel"])


def test_weights_of_a_given_step(saved):
    weights = checkpoint.load_weights(str(saved), step=20)
    np.testing.assert_array_equal(weights["world_model"]["params"]["dense"]["bias"], 20.0)


def test_what_was_saved_does_not_change_with_a_donated_buffer():
    state = make_state(1)
    host = arrays.to_host({"agent": state})
    kernel = np.array(state.world_model.params["dense"]["kernel"])
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    jax.block_until_ready(add(state.world_model.params))
    np.testing.assert_array_equal(host["agent/world_model/params/dense/kernel"], kernel)


def restore(directory):
    return checkpoint.restore(directory, make_state(0))


@pytest.mark.parametrize("load", [checkpoint.load_weights, restore])
def test_no_checkpoint_is_a_clear_error(tmp_path, load):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=rf"no checkpoint in {path}; there: none"):
            load(path)
    assert not (tmp_path / "nowhere").exists()
    assert checkpoint.load(tmp_path, "a run") is None


def test_a_step_that_is_not_there_is_a_clear_error(saved):
    with pytest.raises(ConfigError, match=r"no checkpoint of step 10 in .*there: \[20, 30\]"):
        checkpoint.load_weights(saved, step=10)


def test_arrays_of_another_configuration_are_named(saved):
    other = make_state(0)
    other = dataclasses.replace(other, world_model=other.world_model.replace(batch_stats={"mean": jnp.zeros(3)}))
    with pytest.raises(ConfigError, match=r"world_model/batch_stats/mean is float32\[2\], .* needs float32\[3\]"):
        checkpoint.restore(saved, other)
    other = dataclasses.replace(other, world_model=other.world_model.replace(batch_stats={"var": jnp.zeros(2)}))
    with pytest.raises(ConfigError, match="no array agent/world_model/batch_stats/var"):
        checkpoint.restore(saved, other)


def test_a_format_of_another_version_is_said_to_be_one(saved):
    for path in (saved / "checkpoints").glob("*/manifest.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"format": manifest.FORMAT + (1 if path.parent.name == "30" else -1)}))
    with pytest.raises(
        ConfigError, match="format 2 of a newer drama_jax.*update drama_jax.*format 0 of an older"
    ) as error:
        checkpoint.load(saved, "a run")
    assert "--no-resume" in str(error.value) and "nothing was removed" in str(error.value)
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["20", "30"]


class Bomb:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code from a checkpoint was executed",))


def test_nothing_is_pickled_and_nothing_unpickled(saved, monkeypatch):
    # A file of pickled objects is refused, even one with the digest that the manifest names.
    assert not [path for path in saved.rglob("*") if path.is_file() and path.read_bytes()[:2] == b"\x80\x04"]
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        files.pack({"bomb": np.array([Bomb()], object)})
    directory = saved / "checkpoints" / "30"
    np.savez(directory / "loop.npz", header=np.array([Bomb()], object))
    content = json.loads((directory / "manifest.json").read_text())
    content["files"]["loop.npz"] = files.describe(directory / "loop.npz")
    del content["sha256"]
    (directory / "manifest.json").write_text(json.dumps(content | {"sha256": manifest._digest(content)}))
    messages: list[str] = []
    found, _ = checkpoint.load(saved, "a run", messages.append)
    assert found.step == 20 and "Object arrays cannot be loaded" in messages[0]
    with pytest.raises(ValueError, match="not an .npz file|pickled"):
        files.unpack(pickle.dumps(Bomb()))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bit_of_a_checkpoint_can_flip_unnoticed(saved, data):
    directory = saved / "checkpoints" / "30"
    paths = sorted(path for path in [*directory.rglob("*"), *(saved / "replay").glob("[19]*")] if path.is_file())
    path = data.draw(st.sampled_from(paths))
    before = path.read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        assert manifest.verify(directory, saved, "a run") == manifest.read(directory)
        # Only white space of the manifest may change.
        assert path.name == "manifest.json" and json.loads(bytes(content)) == json.loads(before)
    except manifest.Invalid as error:
        assert path.name in str(error)
    finally:
        path.write_bytes(before)
