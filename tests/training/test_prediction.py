"""The world model predicts: one-step frames of real Breakout beat a copy of the frame before.

The tiny preset sees all of Breakout at 32 pixels, where the paddle is half a pixel tall: its short run learns the
background, not what moves. Here the same model sees the strip around the paddle instead, stretched to 32 x 32.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import agent
from drama_jax.config import preset
from drama_jax.envs import make_atari
from drama_jax.replay import Batch
from drama_jax.training import loop, prediction

SEED = 0
TRAINED, HELD_OUT = 1_600, 600  # steps
WINDOW, CONTEXT = 20, 4
UPDATES = 400


def paddle_strip(frame):
    """[160, 160, 3] uint8 -> [32, 32, 3]: rows 138 to 153 twice as tall, columns averaged in fives."""
    return np.repeat(frame[138:154], 2, axis=0).reshape(32, 32, 5, 3).mean(axis=2).astype(np.uint8)


def play(rng, environment, steps):
    """`steps` steps of uniformly random play, one column per field of `Transition`."""
    rows = []
    observation = environment.reset()
    while len(rows) < steps:
        actions = rng.integers(environment.num_actions, size=1, dtype=np.int32)
        after = environment.step(actions)
        frame = paddle_strip(observation.frames[0])
        rows.append((frame, actions[0], after.rewards[0], after.terminals[0], observation.first[0]))
        observation = environment.step(actions) if after.last[0] else after
    return [jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)]


@pytest.fixture(scope="module")
def trained():
    """An agent whose world model was trained on random play, and windows [B, T] of steps that it has not seen."""
    config = preset("tiny")
    rng = np.random.default_rng(SEED)
    environment = make_atari("Breakout", config.atari, num_envs=1, image_size=160, seed=SEED)
    with contextlib.closing(environment):
        columns = play(rng, environment, TRAINED)
        held_out = play(rng, environment, HELD_OUT)
        num_actions = environment.num_actions
    memory = dataclasses.replace(config.agent.replay, capacity=TRAINED)
    state = loop.initial_state(jax.random.key(SEED), dataclasses.replace(config.agent, replay=memory), num_actions)
    fields = dict(zip(("frames", "actions", "rewards", "terminals", "firsts"), columns, strict=True))
    state = dataclasses.replace(
        state,
        replay=dataclasses.replace(state.replay, **fields, size=jnp.asarray(TRAINED, jnp.int32)),
        hyper=dataclasses.replace(state.hyper, world_model_learning_rate=jnp.asarray(2e-3, jnp.float32)),
    )
    update = jax.jit(agent.train_world_model, donate_argnums=0)
    for _ in range(UPDATES):
        state, _ = update(state)
    return state, Batch(*(column.reshape(-1, WINDOW, *column.shape[1:]) for column in held_out))


measure = jax.jit(prediction.one_step_errors, static_argnames="context")


def test_the_next_frame_is_predicted_better_than_copied(trained):
    errors = measure(*trained, context=CONTEXT)
    assert errors.pairs > 150
    assert errors.model < 0.7 * errors.copy
    # What the autoencoder loses is lost to every latent.
    assert errors.reconstruction < errors.model


def test_the_prediction_comes_from_the_past_in_its_order(trained):
    ordered = measure(*trained, context=CONTEXT)
    order = jnp.asarray(np.random.default_rng(SEED).permutation(WINDOW))
    shuffled = measure(*trained, context=CONTEXT, order=order)
    assert shuffled.model > 1.5 * ordered.model
    assert shuffled.model > shuffled.copy
    # The order reaches the sequence model only.
    np.testing.assert_allclose(shuffled.copy, ordered.copy, rtol=1e-6)
    np.testing.assert_allclose(shuffled.reconstruction, ordered.reconstruction, rtol=1e-6)


def test_the_prediction_depends_on_the_action(trained):
    state, batch = trained
    other = dataclasses.replace(batch, actions=(batch.actions + 2) % state.num_actions)
    assert measure(state, other, context=CONTEXT).model > 1.2 * measure(state, batch, context=CONTEXT).model


def test_pairs_count_where_something_moves_inside_an_episode_after_the_context(trained):
    state, _ = trained
    frames = np.zeros((1, 8, 32, 32, 3), np.uint8)
    frames[0, [1, 4, 6]] = 90  # changes at 0-1, 1-2, 3-4, 4-5, 5-6 and 6-7
    firsts = np.zeros((1, 8), bool)
    firsts[0, [0, 5]] = True
    made = Batch(
        frames=jnp.asarray(frames),
        actions=jnp.zeros((1, 8), jnp.int32),
        rewards=jnp.zeros((1, 8)),
        terminals=jnp.zeros((1, 8), bool),
        firsts=jnp.asarray(firsts),
    )
    assert measure(state, made, context=1).pairs == 4  # 1-2, 3-4, 5-6, 6-7
    still = dataclasses.replace(made, frames=jnp.zeros_like(made.frames))
    errors = measure(state, still, context=1)
    assert (errors.pairs, errors.model, errors.copy) == (0, 0, 0)
