"""A sequence model straight on the tokens of the grid world: how it is made, trained, and found wrong.

After the long-sequence study of the paper (arXiv 2410.08893): every frame is 25 cells and an action, and the model
predicts each token from all tokens before it. Through the common interface of `drama_jax.backbones` it is given the
token as a one-hot latent, and the token's place in its frame (0..25) as the action; a linear layer makes logits of the
features. The loss is the cross-entropy of the cells of every frame but the first; actions are random, and not learnt.

Letters: B batch, T tokens, W frames of a sequence, V tokens of the vocabulary, C colours, E places of a frame.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from drama_jax import backbones, checks, optim, precision
from drama_jax.config import BackboneConfig, OptimizerConfig
from drama_jax.envs.grid_world import GridWorld, walk

_OPTIMIZER = OptimizerConfig(learning_rate=5e-3, b2=0.99, warmup_updates=50, max_grad_norm=1.0)
_ENV = GridWorld()


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """One model of the study, and the sequences that it sees; static."""

    backbone: BackboneConfig
    frames: int
    """W, the frames of a sequence."""
    batch_size: int
    """B, the sequences of an update."""
    optimizer: OptimizerConfig = _OPTIMIZER
    compute_dtype: str = "float32"
    env: GridWorld = _ENV

    def __post_init__(self) -> None:
        checks.integers("StudyConfig", 2, frames=self.frames)
        checks.integers("StudyConfig", batch_size=self.batch_size)

    @property
    def places(self) -> int:
        """E, the tokens of a frame: its cells, and the action after it."""
        return self.env.size**2 + 1

    @property
    def num_tokens(self) -> int:
        """T, the tokens of a sequence."""
        return self.frames * self.places


class TokenModel(nn.Module):
    """Logits of the next token; parallel and step form agree."""

    config: StudyConfig

    def setup(self) -> None:
        """Declares the sub-modules."""
        c = self.config
        dtype = precision.named(c.compute_dtype)
        self.backbone = backbones.make(c.backbone, c.places, dtype)
        self.head = nn.Dense(c.env.num_tokens, dtype=dtype, param_dtype=precision.at_least_float32(dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] int32 from the first of a frame on -> logits [B, T, V] of the tokens that follow each."""
        place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32) % self.config.places, tokens.shape)
        features, _ = self.backbone(self._one_hot(tokens), place)
        return precision.widen(self.head(features))

    def step(self, token: jax.Array, place: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Tokens [B] at places [B], and what the backbone remembers -> logits [B, V] of the next, its memory after."""
        feature, state = self.backbone.step(self._one_hot(token), place, state)
        return precision.widen(self.head(feature)), state

    def initial_state(self, batch_size: int) -> Any:
        """What the backbone remembers before the first token."""
        return self.backbone.initial_state(batch_size)

    def _one_hot(self, tokens: jax.Array) -> jax.Array:
        dtype = precision.named(self.config.compute_dtype)
        return jax.nn.one_hot(tokens, self.config.env.num_tokens, dtype=dtype)


@flax.struct.dataclass
class TrainState:
    """A model in training."""

    params: Any  # float32 (float64 if computed in it)
    optimizer: optax.OptState


@flax.struct.dataclass
class Walks:
    """Episodes of random actions."""

    tokens: jax.Array  # [..., T] int32
    frames: jax.Array  # [..., W, E - 1] int32
    gaps: jax.Array  # [..., W] int32, see `GridWorld.gap`


@flax.struct.dataclass
class Errors:
    """What was predicted wrong, counted for every gap G = 0..W - 1 (0: a cell that was not shown before)."""

    frames: jax.Array  # [G] int32, frames with this gap
    colour: jax.Array  # [G] int32: of those, the colour under the agent, if only colours were to choose from
    cell: jax.Array  # [G] int32: the token under the agent
    frame: jax.Array  # [G] int32: any of the frame's cells


def init(config: StudyConfig, key: jax.Array) -> TrainState:
    """A new model. The key is consumed."""
    checks.instances("grid_world_model.init", config=(config, StudyConfig))
    checks.key("grid_world_model.init", key)
    params = TokenModel(config).init(key, jnp.zeros((1, config.places), jnp.int32))
    return TrainState(params=params, optimizer=optim.make_optimizer(config.optimizer).init(params))


def walks(config: StudyConfig, key: jax.Array, count: int) -> Walks:
    """Fresh episodes, [count, ...]. The key is consumed."""
    made = jax.vmap(lambda one: walk(config.env, one, config.frames))(jax.random.split(key, count))
    cells = made.frames.reshape(count, config.frames, -1)
    return Walks(tokens=config.env.tokens(made.frames, made.actions), frames=cells, gaps=made.gaps)


def loss(config: StudyConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy [] in nats of a cell, the mean over tokens [B, T] but for actions and the first frame."""
    logits, targets = predictions(config, params, tokens)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets))


def predictions(config: StudyConfig, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B, W - 1, E - 1, V] and targets [B, W - 1, E - 1] of the cells of all frames but the first."""
    logits = TokenModel(config).apply(params, tokens[:, :-1])
    batch, first = tokens.shape[0], config.places
    # Token t is predicted after token t - 1: the first cell of a frame after the action of the frame before.
    logits = logits[:, first - 1 :].reshape(batch, config.frames - 1, config.places, -1)
    targets = tokens[:, first:].reshape(batch, config.frames - 1, config.places)
    return logits[:, :, :-1], targets[:, :, :-1]


def update(config: StudyConfig, state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
    """One update on tokens [B, T]: the state after it, and the loss [] before."""
    value, gradient = jax.value_and_grad(functools.partial(loss, config))(state.params, tokens)
    steps, optimizer = optim.make_optimizer(config.optimizer).update(gradient, state.optimizer, state.params)
    return TrainState(params=optax.apply_updates(state.params, steps), optimizer=optimizer), value


def updates(config: StudyConfig, state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
    """An update on each batch of tokens [U, B, T] in turn: the state, and the losses [U]."""
    return jax.lax.scan(functools.partial(update, config), state, tokens)


def train(config: StudyConfig, count: int, state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array]:
    """`count` updates, each on fresh episodes: the state, and the losses [count]. The key is consumed."""
    made = walks(config, key, count * config.batch_size)
    return updates(config, state, made.tokens.reshape(count, config.batch_size, -1))


def errors(config: StudyConfig, batches: int, state: TrainState, key: jax.Array) -> Errors:
    """What the model predicts wrong in `batches` batches of fresh episodes. The key is consumed."""

    def one(key: jax.Array) -> Errors:
        made = walks(config, key, config.batch_size)
        logits, _ = predictions(config, state.params, made.tokens)
        return count_errors(config, logits, made)

    counted = jax.lax.map(one, jax.random.split(key, batches))
    return jax.tree.map(lambda counts: jnp.sum(counts, axis=0, dtype=jnp.int32), counted)


def count_errors(config: StudyConfig, logits: jax.Array, made: Walks) -> Errors:
    """Counts wrong predictions by gap: logits [B, W - 1, E - 1, V] of the frames after the first of B walks."""
    frames, gaps = made.frames[:, 1:], made.gaps[:, 1:]
    under = jnp.argmax(frames, axis=-1)  # the one cell that is not covered
    colour = jnp.max(frames, axis=-1)
    there = jnp.take_along_axis(logits, under[..., None, None], axis=2)[:, :, 0]
    colours = there[..., 1 : config.env.colours + 1]
    wrong = {
        "frames": jnp.ones_like(gaps, bool),
        "colour": jnp.argmax(colours, axis=-1) + 1 != colour,
        "cell": jnp.argmax(there, axis=-1) != colour,
        "frame": jnp.any(jnp.argmax(logits, axis=-1) != frames, axis=-1),
    }
    each = gaps.reshape(-1)[:, None] == jnp.arange(config.frames)
    return Errors(
        **{name: jnp.sum(each & value.reshape(-1)[:, None], axis=0, dtype=jnp.int32) for name, value in wrong.items()}
    )
