"""The sequence model RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892), which Drama's comparison lacks.

Per layer, time mixing and channel mixing, each behind a layer norm and added to the residual stream:

* token shift: what a projection sees lies between x_t and x_(t-1), how far depends on both;
* time mixing: a linear recurrence with a decay per channel that depends on the data, see `drama_jax.backbones.wkv`;
* channel mixing: a gated two-layer network, token shift with fixed weights.

Shapes: B batch, T time, D width, I = H P width of keys and values, F hidden width of channel mixing.
"""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax.backbones.parts import BLOCK_EPS, layer_norm, uniform_fan_in
from drama_jax.backbones.residual import ResidualBackbone
from drama_jax.backbones.wkv import wkv, wkv_step
from drama_jax.config import BackboneConfig
from drama_jax.precision import at_least_float32

_HEAD_EPS = 64e-5
_SHIFTED = ("decay", "key", "value", "receptance", "gate")
_MOST_DECAY = 4.6
"""Largest d of the decay exp(-exp(d)) that is told from its neighbours: there a step leaves 1e-43 of the state."""


@flax.struct.dataclass
class RwkvLayerState:
    """What one layer remembers."""

    time_input: jax.Array  # [B, D] float32 (float64 if computed in it): the last input of time mixing
    channel_input: jax.Array  # [B, D] like it: the last input of channel mixing
    wkv: jax.Array  # [B, H, P, P] like it: the state of the recurrence


class RwkvBackbone(ResidualBackbone):
    """The whole sequence model; see `drama_jax.backbones` for the interface."""

    def block(self, layer: int) -> nn.Module:
        """Time mixing and channel mixing."""
        return RwkvBlock(self.config, layer, self.dtype)

    def initial_layer_state(self, batch_size: int) -> RwkvLayerState:
        """Zeros."""
        c, wide = self.config, at_least_float32(self.dtype)
        return RwkvLayerState(
            time_input=jnp.zeros((batch_size, c.width), wide),
            channel_input=jnp.zeros((batch_size, c.width), wide),
            wkv=jnp.zeros((batch_size, c.num_heads, c.head_dim, c.head_dim), wide),
        )


class RwkvBlock(nn.Module):
    """x + time mixing, then + channel mixing; without the x that the caller adds."""

    config: BackboneConfig
    layer: int
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares the sub-modules."""
        wide = at_least_float32(self.dtype)
        self.norm_time, self.norm_channel = layer_norm(BLOCK_EPS, wide), layer_norm(BLOCK_EPS, wide)
        self.time = TimeMixing(self.config, self.layer, self.dtype)
        self.channel = ChannelMixing(self.config, self.layer, self.dtype)

    def __call__(
        self, residual: jax.Array, state: RwkvLayerState, index: jax.Array | None
    ) -> tuple[jax.Array, RwkvLayerState]:
        """Over a sequence: residual [B, T, D], segment index [B, T] -> update [B, T, D], state after it."""
        x = self.norm_time(residual)
        mixed, wkv_state = self.time(x, _before(x, state.time_input, index), state.wkv, index)
        mixed = mixed.astype(residual.dtype)
        y = self.norm_channel(residual + mixed)
        update = mixed + self.channel(y, _before(y, state.channel_input, index)).astype(residual.dtype)
        return update, RwkvLayerState(time_input=x[:, -1], channel_input=y[:, -1], wkv=wkv_state)

    def step(self, residual: jax.Array, state: RwkvLayerState) -> tuple[jax.Array, RwkvLayerState]:
        """One step: residual [B, D] -> update [B, D], state after it."""
        x = self.norm_time(residual)
        mixed, wkv_state = self.time.step(x, state.time_input.astype(x.dtype), state.wkv)
        mixed = mixed.astype(residual.dtype)
        y = self.norm_channel(residual + mixed)
        update = mixed + self.channel(y, state.channel_input.astype(y.dtype)).astype(residual.dtype)
        return update, RwkvLayerState(time_input=x, channel_input=y, wkv=wkv_state)


def _before(x: jax.Array, last: jax.Array, index: jax.Array | None) -> jax.Array:
    """x_(t-1) [B, T, D] of the same segment, `last` [B, D] before the first step; else 0."""
    shifted = jnp.concatenate([last[:, None].astype(x.dtype), x[:, :-1]], axis=1)
    if index is None:
        return shifted
    return jnp.where((jnp.diff(index, axis=1, prepend=0) > 0)[..., None], 0, shifted)


class TimeMixing(nn.Module):
    """Time mixing (arXiv 2404.05892)."""

    config: BackboneConfig
    layer: int
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares sub-modules and parameters."""
        c, wide = self.config, at_least_float32(self.dtype)
        inner, rank = c.mixer_size, max(8, c.width // 32)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=wide)
        small = nn.initializers.uniform(1e-2)
        param, depth = self.param, self.layer / max(c.num_layers - 1, 1)
        shift = functools.partial(_init_shift, layer=self.layer, num_layers=c.num_layers)
        powers = {"receptance": 0.5, "gate": 0.5}
        added = {"value": 0.3 * depth}
        self.shift = param("shift", functools.partial(shift, power=1.0), (c.width,), wide)
        self.shifts = [
            param(
                f"shift_{name}",
                functools.partial(shift, power=powers.get(name, 1.0), added=added.get(name, 0.0)),
                (c.width,),
                wide,
            )
            for name in _SHIFTED
        ]
        self.shift_down = param("shift_down", nn.initializers.zeros, (c.width, len(_SHIFTED) * rank), wide)
        self.shift_up = param("shift_up", small, (len(_SHIFTED), rank, c.width), wide)
        self.decay = param("decay", functools.partial(_init_decay, depth=depth), (inner,), wide)
        self.decay_down = param("decay_down", nn.initializers.zeros, (c.width, 2 * rank), wide)
        self.decay_up = param("decay_up", small, (2 * rank, inner), wide)
        self.u = param("u", functools.partial(_init_u, depth=depth), (inner,), wide)
        self.receptance, self.key, self.value, self.gate = (
            dense(inner, kernel_init=uniform_fan_in()) for _ in range(4)
        )
        self.head_scale = param("head_scale", nn.initializers.ones, (inner,), wide)
        self.head_bias = param("head_bias", nn.initializers.zeros, (inner,), wide)
        self.out = dense(c.width, kernel_init=uniform_fan_in(1.0 / c.num_layers))

    def __call__(
        self, x: jax.Array, before: jax.Array, state: jax.Array, index: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Over a sequence.

        Args:
          x: `[B, T, D]`, and `before`: x of the step before.
          state: `[B, H, P, P]`.
          index: optional `[B, T]` int32 from `segment_index`.

        Returns:
          `[B, T, D]` in the compute dtype, and the state after the last step.
        """
        r, k, v, log_decay, gate = self._project(x, before)
        u, size = self._heads(self.u), self.config.chunk_size
        y, state = wkv(r, k, v, log_decay, u, state, index=index, chunk_size=size)
        return self._gate_and_project(y, gate), state

    def step(self, x: jax.Array, before: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: x and the x before it [B, D] -> [B, D] in the compute dtype, and the state after it."""
        r, k, v, log_decay, gate = self._project(x, before)
        y, state = wkv_step(r, k, v, log_decay, self._heads(self.u), state)
        return self._gate_and_project(y, gate), state

    def _project(self, x: jax.Array, before: jax.Array) -> tuple[jax.Array, ...]:
        """r, k, v and the log decay [.., H, P], and the gate [.., I]."""
        wide, dtype = at_least_float32(self.dtype), self.dtype
        towards = before - x
        between = jnp.matmul((x + towards * self.shift).astype(dtype), self.shift_down.astype(dtype))
        between = jnp.tanh(between.reshape(*x.shape[:-1], len(_SHIFTED), -1))
        share = jnp.einsum("...sr,srd->...sd", between, self.shift_up.astype(dtype), preferred_element_type=wide)
        decay, key, value, receptance, gate = (
            (x + towards * (shift + share[..., i, :])).astype(dtype) for i, shift in enumerate(self.shifts)
        )
        low = jnp.tanh(jnp.matmul(decay, self.decay_down.astype(dtype)))
        d = self.decay + jnp.matmul(low, self.decay_up.astype(dtype), preferred_element_type=wide)
        log_decay = -jnp.exp(jnp.minimum(d, _MOST_DECAY))
        return (
            *map(self._heads, (self.receptance(receptance), self.key(key), self.value(value), log_decay)),
            self.gate(gate),
        )

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

    def _gate_and_project(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """A layer norm in every head, the gate, the output projection."""
        centred = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + _HEAD_EPS)).reshape(gate.shape)
        y = (y * self.head_scale + self.head_bias) * nn.silu(gate.astype(y.dtype))
        return self.out(y.astype(self.dtype))


class ChannelMixing(nn.Module):
    """Channel mixing (arXiv 2404.05892): sigmoid(W_r r) W_v ReLU(W_k k)^2, r and k shifted."""

    config: BackboneConfig
    layer: int
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        """x and the x of the step before [.., D] -> [.., D] in at least float32."""
        c, wide = self.config, at_least_float32(self.dtype)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=wide)
        shift = functools.partial(_init_shift, layer=self.layer, num_layers=c.num_layers, power=1.0)
        towards = before - x
        key, receptance = (
            (x + towards * self.param(f"shift_{name}", shift, (c.width,), wide)).astype(self.dtype)
            for name in ("key", "receptance")
        )
        hidden = jnp.square(nn.relu(dense(c.feedforward_size, kernel_init=uniform_fan_in(), name="key")(key)))
        value = dense(c.width, kernel_init=uniform_fan_in(1.0 / c.num_layers), name="value")(hidden)
        gate = dense(c.width, kernel_init=uniform_fan_in(), name="receptance")(receptance)
        return nn.sigmoid(gate.astype(wide)) * value.astype(wide)


def _init_shift(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any = jnp.float32,
    *,
    layer: int,
    num_layers: int,
    power: float,
    added: float = 0.0,
) -> jax.Array:
    """How far channels look back: the first ones fully, the last ones not, the less the later the layer."""
    del key
    channel = jnp.arange(shape[0]).astype(dtype) / shape[0]
    return 1 - (channel ** (power * (1 - layer / num_layers)) + added)


def _init_decay(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *, depth: float) -> jax.Array:
    """From slow (d = -6) to fast (-1) over the channels; `depth` goes from 0 to 1 over the layers."""
    del key
    channel = jnp.arange(shape[0]).astype(dtype) / max(shape[0] - 1, 1)
    return -6 + 5 * channel ** (0.7 + 1.3 * depth)


def _init_u(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *, depth: float) -> jax.Array:
    """Falls from 1 over the channels in the last layer, 0 in the first, with a pattern of three on top."""
    del key
    n = jnp.arange(shape[0])
    pattern = ((n + 1) % 3 - 1).astype(dtype) * 0.1
    return depth * (1 - n.astype(dtype) / max(shape[0] - 1, 1)) + pattern
