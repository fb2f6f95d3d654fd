"""The Mamba-1 sequence model (Gu & Dao 2023, arXiv 2312.00752; the comparison of arXiv 2410.08893).

The blocks of Mamba-2 with another mixer: step size, input and output projections come of the convolved x, and every
channel has decays of its own.

Shapes: B batch, T time, D width, I inner width, N state dim, W conv width, R rank of the step size's projection.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax.backbones.causal_conv import CausalConv
from drama_jax.backbones.parts import BLOCK_EPS, init_dt_bias, uniform_fan_in
from drama_jax.backbones.residual import ResidualBackbone
from drama_jax.config import BackboneConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32
from drama_jax.ssd import selective_scan, selective_step

_CHANNELS_PER_RANK = 16


@flax.struct.dataclass
class MambaLayerState:
    """What one mixer remembers."""

    conv: jax.Array  # [B, W - 1, I] compute dtype: the last inputs of the convolution, oldest first
    ssm: jax.Array  # [B, I, N] float32 (float64 if computed in it)


class MambaBackbone(ResidualBackbone):
    """The whole sequence model; see `drama_jax.backbones` for the interface."""

    def block(self, layer: int) -> nn.Module:
        """Norm and mixer."""
        del layer
        return MambaBlock(self.config, self.dtype)

    def initial_layer_state(self, batch_size: int) -> MambaLayerState:
        """Zeros."""
        return initial_state(self.config, self.dtype, batch_size)


def initial_state(config: BackboneConfig, dtype: jax.typing.DTypeLike, batch_size: int) -> MambaLayerState:
    """The state of one mixer before the first step: zeros."""
    return MambaLayerState(
        conv=jnp.zeros((batch_size, config.conv_width - 1, config.inner_width), dtype),
        ssm=jnp.zeros((batch_size, config.inner_width, config.state_dim), at_least_float32(dtype)),
    )


class MambaBlock(nn.Module):
    """mixer(RMSNorm(residual))."""

    config: BackboneConfig
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares the sub-modules."""
        self.norm = rms_norm(BLOCK_EPS, at_least_float32(self.dtype))
        self.mixer = MambaMixer(self.config, self.dtype)

    def __call__(
        self, residual: jax.Array, state: MambaLayerState, index: jax.Array | None
    ) -> tuple[jax.Array, MambaLayerState]:
        """Over a sequence: residual [B, T, D], segment index [B, T] -> update [B, T, D], state after it."""
        return self.mixer(self.norm(residual), state, index)

    def step(self, residual: jax.Array, state: MambaLayerState) -> tuple[jax.Array, MambaLayerState]:
        """One step: residual [B, D] -> update [B, D], state after it."""
        return self.mixer.step(self.norm(residual), state)


class MambaMixer(nn.Module):
    """The Mamba-1 mixer (Gu & Dao 2023, section 3.4 and figure 3)."""

    config: BackboneConfig
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares sub-modules and parameters."""
        c, wide = self.config, at_least_float32(self.dtype)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=wide)
        self.rank = -(-c.width // _CHANNELS_PER_RANK)
        self.in_proj = dense(2 * c.inner_width, kernel_init=uniform_fan_in())  # [x | z]
        self.conv = CausalConv(c.conv_width, c.inner_width, self.dtype)
        self.x_proj = dense(self.rank + 2 * c.state_dim, kernel_init=uniform_fan_in())  # [step size | B | C]
        self.dt_proj = dense(c.inner_width, kernel_init=uniform_fan_in())
        self.dt_bias = self.param("dt_bias", init_dt_bias, (c.inner_width,), wide)
        self.A_log = self.param("A_log", _init_log_decay, (c.inner_width, c.state_dim), wide)
        self.D = self.param("D", nn.initializers.ones, (c.inner_width,), wide)
        self.out_proj = dense(c.width, kernel_init=uniform_fan_in(1.0 / c.num_layers))

    def __call__(
        self, u: jax.Array, state: MambaLayerState, index: jax.Array | None = None
    ) -> tuple[jax.Array, MambaLayerState]:
        """Over a sequence.

        Args:
          u: `[B, T, D]`.
          state: the state before the first step.
          index: optional `[B, T]` int32 from `segment_index`.

        Returns:
          `[B, T, D]` in the compute dtype, and the state after the last step.
        """
        x, z = jnp.split(self.in_proj(u), 2, axis=-1)
        x, conv = self.conv(x, state.conv, index)
        dt, A, B, C = self._selection(x)
        y, ssm = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D=self.D,
            initial_state=state.ssm,
            segment_ids=index,
            chunk_size=self.config.chunk_size,
        )
        return self._gate_and_project(y, z), MambaLayerState(conv=conv, ssm=ssm)

    def step(self, u: jax.Array, state: MambaLayerState) -> tuple[jax.Array, MambaLayerState]:
        """One step: u [B, D] -> [B, D] in the compute dtype, and the state after it."""
        x, z = jnp.split(self.in_proj(u), 2, axis=-1)
        x, conv = self.conv(x[:, None], state.conv)
        x = x[:, 0]
        dt, A, B, C = self._selection(x)
        y, ssm = selective_step(state.ssm, x, dt, A, B, C, D=self.D)
        return self._gate_and_project(y, z), MambaLayerState(conv=conv, ssm=ssm)

    def _selection(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Step sizes [.., I], decay rates [I, N], B and C [.., N], from the convolved x [.., I]."""
        wide = at_least_float32(self.dtype)
        low, B, C = jnp.split(self.x_proj(x), [self.rank, self.rank + self.config.state_dim], axis=-1)
        dt = jax.nn.softplus(self.dt_proj(low).astype(wide) + self.dt_bias.astype(wide))
        return dt, -jnp.exp(self.A_log), B, C

    def _gate_and_project(self, y: jax.Array, z: jax.Array) -> jax.Array:
        wide = at_least_float32(self.dtype)
        return self.out_proj((y.astype(wide) * nn.silu(z.astype(wide))).astype(self.dtype))


def _init_log_decay(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Decay rates 1 to N in every channel; the key is not used."""
    del key
    rates = [math.log(n + 1) for n in range(shape[1])]
    return jnp.broadcast_to(jnp.asarray(rates, dtype), shape)
