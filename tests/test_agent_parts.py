"""The agent with each sequence model and each learner: a whole update at a tiny size, acting, seeds side by side."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import agent, replay
from drama_jax.config import (
    AgentConfig,
    AutoencoderConfig,
    BackboneConfig,
    BehaviourConfig,
    ImaginationConfig,
    OptimizerConfig,
    ReplayConfig,
    WorldModelConfig,
)

ACTIONS, CONTEXT, HORIZON = 3, 3, 4
RATE = OptimizerConfig(learning_rate=1e-3, warmup_updates=0)
BACKBONE = {"width": 8, "num_layers": 1, "head_dim": 4, "state_dim": 3, "chunk_size": 4, "max_length": 7}


def config(backbone, behaviour):
    return AgentConfig(
        world_model=WorldModelConfig(
            autoencoder=AutoencoderConfig(image_size=8, depths=(4, 8), categoricals=4, classes=4),
            backbone=BackboneConfig(name=backbone, **BACKBONE),
            head_units=8,
            free_bits=0.0,  # else the prior has no gradient at this size
            optimizer=RATE,
            batch_size=2,
            batch_length=6,
            compute_dtype="float32",
        ),
        imagination=ImaginationConfig(batch_size=4, context_length=CONTEXT, horizon=HORIZON, unroll=1),
        behaviour=BehaviourConfig(
            name=behaviour,
            actor_layers=1,
            actor_units=8,
            critic_layers=1,
            critic_units=8,
            compute_dtype="float32",
            minibatch_size=10,
            optimizer=RATE,
        ),
        replay=ReplayConfig(capacity=32),
        acting_context=4,
        warmup_steps=16,
    )


def transitions():
    """Of a replay that holds 17 steps, and one more."""
    rng = np.random.default_rng(0)
    firsts = np.arange(18) % 7 == 0
    return replay.Transition(
        frame=rng.integers(0, 256, (18, 8, 8, 3), np.uint8),
        action=rng.integers(0, ACTIONS, 18, np.int32),
        reward=rng.normal(size=18).astype(np.float32),
        terminal=np.roll(firsts, -1),
        first=firsts,
    )


def drawn(path, leaf, rng):
    """An array like `leaf` of an agent: drawn for parameters, which takes no compilation, else what it begins with."""
    name = jax.tree_util.keystr(path)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if ".params" in name or ".slow_critic" in name:
        return (0.3 * rng.normal(size=leaf.shape) + name.endswith("'scale']")).astype(leaf.dtype)
    return np.full(leaf.shape, "var" in name.rsplit(".", 1)[-1] or "variance" in name, leaf.dtype)


def filled(config):
    """An agent whose replay holds 17 steps."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: agent.init(key, config, ACTIONS), jax.random.key(0))
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: drawn(path, leaf, rng), shapes)
    memory, steps = state.replay, transitions()
    rows = {"frames": "frame", "actions": "action", "rewards": "reward", "terminals": "terminal", "firsts": "first"}
    for name, field in rows.items():
        getattr(memory, name)[:17] = getattr(steps, field)[:17].reshape(17, *getattr(memory, name).shape[1:])
    memory = memory.replace(size=np.int32(17), position=np.int32(17))
    return state.replace(replay=memory, hyper=agent.hyper(config))


def assert_moved(before, after):
    """Every array is finite and has changed, but for biases in front of a batch norm, which have no effect."""
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after)):
        new = np.asarray(new)
        assert (old.shape, old.dtype) == (new.shape, new.dtype) and np.isfinite(new).all(), path
        assert np.any(old != new) or "conv_" in str(path), path


@pytest.mark.parametrize("drawn", [False, True])
def test_an_imagined_episode_ends_with_the_predicted_probability_or_where_it_is_likely(drawn):
    whole = config("gru", "actor_critic")
    rollouts = dataclasses.replace(whole.imagination, draw_terminations=drawn)
    state = filled(dataclasses.replace(whole, imagination=rollouts))
    head = state.world_model.params["termination_head"]["output"]
    head["kernel"] *= 0
    context = replay.gather(state.replay, np.arange(100, dtype=np.int32) % 12, CONTEXT)
    imagine = jax.jit(lambda state: agent.imagine(state, context, jax.random.key(2))[0])
    head["bias"] = np.log([3 / 7], dtype=np.float32)
    ended = imagine(state).terminations
    assert ended.shape == (100, HORIZON) and ended.dtype == bool
    assert abs(ended.mean() - (0.3 if drawn else 0)) < 4 * np.sqrt(0.3 * 0.7 / ended.size)
    head["bias"] += 20
    assert imagine(state).terminations.all()


def test_a_whole_update_with_rwkv_and_ppo():
    state = filled(config("rwkv", "ppo"))
    after, metrics = jax.jit(agent.update)(state, jax.tree.map(lambda x: x[17], transitions()))
    assert_moved(state.world_model.params, after.world_model.params)
    assert_moved(state.behaviour.params, after.behaviour.params)
    chex.assert_tree_all_finite(metrics)
    assert metrics["actor_critic/kl"] > 0
    # 16 imagined steps in minibatches of 10 and 6, three times over; their hidden parts differ.
    assert after.behaviour.normaliser.count == pytest.approx(3 * 16)
    assert np.all(after.behaviour.normaliser.variance[16:] > 1e-6)


@pytest.mark.parametrize(
    ("backbone", "behaviour", "dtype"),
    [
        ("mamba2", "ppo", "float32"),
        ("mamba", "actor_critic", "bfloat16"),
        ("gru", "actor_critic", "bfloat16"),
        ("transformer", "ppo", "bfloat16"),
        ("rwkv", "ppo", "bfloat16"),
    ],
)
def test_any_sequence_model_goes_with_any_learner_and_precision(backbone, behaviour, dtype):
    """Traced, not compiled: an update, dreams in a loop unrolled whole, acting, a video."""
    whole = config(backbone, behaviour).with_compute_dtype(dtype)
    whole = dataclasses.replace(whole, imagination=dataclasses.replace(whole.imagination, unroll=HORIZON))

    def run(key, step):
        state, _ = agent.update(agent.init(key, whole, ACTIONS), step)
        acting, frames = agent.initial_acting(state, 2), jnp.stack([step.frame] * 2)
        action, acting = agent.act(state, acting, frames, key, jnp.zeros((2,), bool))
        video = agent.imagine_video(state, replay.gather(state.replay, jnp.zeros((2,), jnp.int32), 7), key, CONTEXT)
        return state, action, video

    step = jax.tree.map(lambda x: jnp.asarray(x[17]), transitions())
    state, action, video = jax.eval_shape(run, jax.random.key(0), step)
    before = jax.eval_shape(lambda key: agent.init(key, whole, ACTIONS), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    assert action.shape == (2,) and video.shape == (2, 7, 8, 8, 3)
