"""A transformer as the sequence model: causal attention, with a cache of keys and values for single steps.

The architecture is that of the released code's variant (arXiv 2410.08893's comparison, after STORM, arXiv 2310.09615):
learned positions that count from the start of the segment, post-norm blocks.

    x = LN(W ReLU(LN(W [z_t, one-hot a_t])));  x = LN(x + position)
    per layer  x = LN(x + W attention(x));  x = LN(x + W ReLU(W x + b) + b)

Dropout acts on the attention weights (`attention_dropout`) and on what a layer adds to x (`dropout`), and only where
`apply` is given random numbers for it, `rngs={"dropout": key}`: in world-model updates.

Shapes: B batch, T time, S slots of the cache, D width, H heads, I = H P width of keys and values, M positions.
"""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax import checks
from drama_jax.action_space import ActionSpace
from drama_jax.backbones.parts import check_inputs, layer_norm, lookup
from drama_jax.backbones.transformer_block import BLOCK_EPS, TransformerBlock, TransformerLayerCache, TransformerStem
from drama_jax.config import BackboneConfig
from drama_jax.precision import at_least_float32
from drama_jax.ssd import segment_index


@flax.struct.dataclass
class TransformerState:
    """What the backbone remembers; S is M, or what `open_window` was asked for."""

    layers: tuple[TransformerLayerCache, ...]  # one per layer
    length: jax.Array  # [B] int32: how many slots are filled


class TransformerBackbone(nn.Module):
    """The whole sequence model; see `drama_jax.backbones` for the interface.

    A segment has M = `config.max_length` positions. Features beyond the last one, or beyond the cache, are NaN.
    """

    config: BackboneConfig
    num_actions: ActionSpace
    dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declares sub-modules and parameters."""
        c, wide = self.config, at_least_float32(self.dtype)
        self.stem = TransformerStem(c.width, self.num_actions, self.dtype)
        self.positions = self.param("positions", nn.initializers.normal(1.0), (c.max_length, c.width), wide)
        self.norm = layer_norm(BLOCK_EPS, wide)
        self.layers = [TransformerBlock(c, self.dtype) for _ in range(c.num_layers)]

    def initial_state(self, batch_size: int) -> TransformerState:
        """The state before the first step of an episode: an empty cache for `max_length` steps."""
        checks.integers("backbone", batch_size=batch_size)
        c = self.config
        empty = jnp.zeros((batch_size, c.max_length, c.mixer_size), self.dtype)
        layer = TransformerLayerCache(keys=empty, values=empty)
        return TransformerState(layers=(layer,) * c.num_layers, length=jnp.zeros((batch_size,), jnp.int32))

    def __call__(
        self,
        latent: jax.Array,
        action: jax.Array,
        *,
        state: TransformerState | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, TransformerState]:
        """Features of a sequence.

        Args:
          latent: `[B, T, S]` float, z_t; T at most `max_length`.
          action: `[B, T]` int, a_t (float `[B, T, A]` if continuous), taken in z_t.
          state: the state before the first step; an empty one if absent.
          segment_ids: optional `[B, T]` int; the state is dropped where the id changes, and `state` belongs to id 0.

        Returns:
          d_t `[B, T, D]` in at least float32, and the state after the last step.

        Raises:
          TypeError, ValueError: if latent, action and state do not fit, or the sequence is too long.
        """
        check_inputs(latent, action, segment_ids, axes=("B", "T"), num_actions=self.num_actions)
        slots = self.config.max_length
        if state is not None:
            self._check_state(state, latent.shape[0])
            slots = state.layers[0].keys.shape[1]
        return self._sequence(latent, action, state, segment_ids, slots)

    def open_window(
        self,
        latent: jax.Array,
        action: jax.Array,
        *,
        horizon: int,
        segment_ids: jax.Array | None = None,
        unrolled: bool = False,
        classes: int | None = None,
    ) -> tuple[jax.Array, TransformerState]:
        """As the call from an empty past, with a cache just long enough for `horizon` further steps.

        Args:
          latent: `[B, T, S]` float, z_t.
          action: `[B, T]` int, a_t (float `[B, T, A]` if continuous), taken in z_t.
          horizon: how many steps may follow, static; features beyond it are NaN.
          segment_ids: optional `[B, T]` int; the past is dropped where the id changes.
          unrolled: makes no difference.
          classes: makes no difference.

        Returns:
          d_t `[B, T, D]` in at least float32, and the state after the last step.

        Raises:
          TypeError, ValueError: if latent and action do not fit, or context and horizon are too long.
        """
        del unrolled, classes
        check_inputs(latent, action, segment_ids, axes=("B", "T"), num_actions=self.num_actions)
        checks.integers("backbone", 1, self.config.max_length, horizon=horizon)
        self._check_length(latent.shape[1] + horizon)
        return self._sequence(latent, action, None, segment_ids, latent.shape[1] + horizon)

    def step(self, latent: jax.Array, action: jax.Array, state: TransformerState) -> tuple[jax.Array, TransformerState]:
        """The feature of one step.

        Args:
          latent: `[B, S]` float, z_t.
          action: `[B]` int, a_t (float `[B, A]` if continuous).
          state: the state before the step, also one from `open_window`.

        Returns:
          d_t `[B, D]` in at least float32, and the state after the step; NaN if the cache was full.

        Raises:
          TypeError, ValueError: if latent, action and state do not fit.
        """
        check_inputs(latent, action, None, axes=("B",), num_actions=self.num_actions)
        self._check_state(state, latent.shape[0])
        x = self._embed(latent, action, state.length)
        layers = []
        for block, cache in zip(self.layers, state.layers, strict=True):
            x, cache = block.step(x, cache, state.length)
            layers.append(cache)
        x = self._where_known(x, state.length, layers[0].keys.shape[1])
        return x, TransformerState(layers=tuple(layers), length=state.length + 1)

    def _sequence(
        self,
        latent: jax.Array,
        action: jax.Array,
        state: TransformerState | None,
        segment_ids: jax.Array | None,
        slots: int,
    ) -> tuple[jax.Array, TransformerState]:
        """The parallel form; the state after it has `slots` slots."""
        batch, time = action.shape[:2]
        self._check_length(time)
        length = jnp.zeros((batch,), jnp.int32) if state is None else state.length
        index = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else segment_index(segment_ids)
        steps = jnp.arange(time, dtype=jnp.int32)
        # Where the segment of each step begins, as a time of this sequence; before it if `state` holds its beginning.
        changed = jnp.diff(index, axis=1, prepend=0) > 0
        start = jax.lax.cummax(jnp.where(changed, steps, -length[:, None]), axis=1)
        mask = (index[:, :, None] == index[:, None]) & (steps[:, None] >= steps)
        if state is not None:
            held = jnp.arange(slots, dtype=jnp.int32) < length[:, None]
            mask = jnp.concatenate([held[:, None] & (index == 0)[:, :, None], mask], axis=2)
        x = self._embed(latent, action, steps - start)
        caches = [None] * len(self.layers) if state is None else state.layers
        layers = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, keys, values = block(x, cache, mask)
            keep = functools.partial(_newest, start=start[:, -1], time=time, slots=slots)
            layers.append(TransformerLayerCache(keys=keep(keys), values=keep(values)))
        x = self._where_known(x, steps - start, self.config.max_length)
        return x, TransformerState(layers=tuple(layers), length=time - start[:, -1])

    def _embed(self, latent: jax.Array, action: jax.Array, position: jax.Array) -> jax.Array:
        """The stream [.., D] before the first layer; past the last position something that nothing known depends on."""
        last = self.config.max_length - 1
        return self.norm(self.stem(latent, action) + lookup(self.positions, jnp.minimum(position, last)))

    def _where_known(self, x: jax.Array, position: jax.Array, slots: int) -> jax.Array:
        """Features [.., D], NaN where there is no such position or slot."""
        # At the end only: a NaN among the keys and values would reach steps that do not look at it.
        return jnp.where((position < min(slots, self.config.max_length))[..., None], x, jnp.nan)

    def _check_length(self, steps: int) -> None:
        if steps > self.config.max_length:
            raise ValueError(
                f"backbone: the transformer has positions for {self.config.max_length} steps "
                f"(BackboneConfig.max_length), got {steps}"
            )

    def _check_state(self, state: Any, batch_size: int) -> None:
        checks.instances("backbone", state=(state, TransformerState))
        if len(state.layers) != self.config.num_layers:
            raise ValueError(f"backbone: state must have {self.config.num_layers} layers, got {len(state.layers)}")
        checks.arrays("backbone, state", {"B": batch_size}, length=(state.length, ("B",), "integer"))
        wanted = (batch_size, "slots", self.config.mixer_size)
        for layer in state.layers:
            checks.arrays("backbone, state", keys=(layer.keys, wanted, "float"), values=(layer.values, wanted, "float"))


def _newest(rows: jax.Array, *, start: jax.Array, time: int, slots: int) -> jax.Array:
    """A cache of the last segment: what was held followed by `time` new rows [B, held + T, I] -> [B, slots, I].

    Args:
      start: `[B]` int32, the time at which the segment began; -n if n of the rows held belong to it.
    """
    held, new = rows.shape[1] - time, start[:, None] + jnp.arange(slots, dtype=jnp.int32)
    source = jnp.where(new < 0, new - start[:, None], held + new)
    kept = jnp.take_along_axis(rows, jnp.minimum(source, held + time - 1)[..., None], axis=1)
    return jnp.where((new < time)[..., None], kept, 0)
