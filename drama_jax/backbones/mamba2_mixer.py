"""One layer of the Mamba-2 sequence model: the mixer, and the block around it (Dao & Gu 2024, section 7).

Letters as in `mamba2`; the mixer has one group.
"""

from __future__ import annotations

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax.backbones.causal_conv import CausalConv
from drama_jax.backbones.mamba2_window import Mamba2LayerWindow, attend, open_window
from drama_jax.backbones.parts import BLOCK_EPS, init_dt_bias, uniform_fan_in
from drama_jax.config import BackboneConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32
from drama_jax.ssd import ssd, ssd_step

_DECAY_RATES = (1.0, 16.0)


@flax.struct.dataclass
class Mamba2LayerState:
    """What one mixer remembers."""

    conv: jax.Array  # [B, W - 1, V] compute dtype: the last inputs of the convolution, oldest first
    ssm: jax.Array  # [B, H, P, N] float32 (float64 if computed in it)


class Block(nn.Module):
    """mixer(RMSNorm(residual)); the caller adds the result to the residual stream."""

    config: BackboneConfig
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares the sub-modules."""
        self.norm = rms_norm(BLOCK_EPS, at_least_float32(self.dtype))
        self.mixer = Mamba2Mixer(self.config, self.dtype)

    def __call__(
        self, residual: jax.Array, state: Mamba2LayerState, index: jax.Array | None
    ) -> tuple[jax.Array, Mamba2LayerState]:
        """Over a sequence: residual [B, T, D], segment index [B, T] -> update [B, T, D], state after it."""
        return self.mixer(self.norm(residual), state, index)

    def open_window(
        self, residual: jax.Array, *, index: jax.Array | None, horizon: int, unrolled: bool
    ) -> tuple[jax.Array, Mamba2LayerWindow]:
        """Over a sequence: residual [B, T, D], segment index [B, T] -> update [B, T, D], window after it."""
        return self.mixer.open_window(self.norm(residual), index, horizon=horizon, unrolled=unrolled)

    def step(
        self, residual: jax.Array, state: Mamba2LayerState | Mamba2LayerWindow
    ) -> tuple[jax.Array, Mamba2LayerState | Mamba2LayerWindow]:
        """One step: residual [B, D] -> update [B, D], state after it."""
        return self.mixer.step(self.norm(residual), state)


class Mamba2Mixer(nn.Module):
    """The Mamba-2 mixer (Dao & Gu 2024, section 7), one group, gate before the inner norm."""

    config: BackboneConfig
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares sub-modules and parameters."""
        c, wide = self.config, at_least_float32(self.dtype)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=wide)
        projected = 2 * c.inner_width + 2 * c.state_dim + c.num_heads  # [z | x | B | C | dt]
        self.in_proj = dense(projected, kernel_init=uniform_fan_in())
        self.conv = CausalConv(c.conv_width, c.inner_width + 2 * c.state_dim, self.dtype)
        self.dt_bias = self.param("dt_bias", init_dt_bias, (c.num_heads,), wide)
        self.A_log = self.param("A_log", _init_log_decay, (c.num_heads,), wide)
        self.D = self.param("D", nn.initializers.ones, (c.num_heads,), wide)
        self.norm = rms_norm(BLOCK_EPS, wide)
        self.out_proj = dense(c.width, kernel_init=uniform_fan_in(1.0 / c.num_layers))

    def __call__(
        self, u: jax.Array, state: Mamba2LayerState, index: jax.Array | None = None
    ) -> tuple[jax.Array, Mamba2LayerState]:
        """Over a sequence.

        Args:
          u: `[B, T, D]`.
          state: the state before the first step.
          index: optional `[B, T]` int32 from `segment_index`.

        Returns:
          `[B, T, D]` in the compute dtype, and the state after the last step.
        """
        z, xBC, dt = self._project(u)
        xBC, conv_state = self.conv(xBC, state.conv, index)
        x, B, C = self._split(xBC)
        y, ssm_state = ssd(
            x,
            self._step_size(dt),
            -jnp.exp(self.A_log),
            B,
            C,
            D=self.D,
            initial_state=state.ssm,
            segment_ids=index,
            chunk_size=self.config.chunk_size,
        )
        return self._gate_and_project(y, z), Mamba2LayerState(conv=conv_state, ssm=ssm_state)

    def open_window(
        self, u: jax.Array, index: jax.Array | None, *, horizon: int, unrolled: bool
    ) -> tuple[jax.Array, Mamba2LayerWindow]:
        """As the call from a zero state, u [B, T, D] -> [B, T, D], with a window of `horizon` steps to come."""
        z, xBC, dt = self._project(u)
        before = jnp.zeros((u.shape[0], self.config.conv_width - 1, xBC.shape[-1]), self.dtype)
        xBC, conv_state = self.conv(xBC, before, index)
        x, B, C = self._split(xBC)
        dt, A = self._step_size(dt), -jnp.exp(self.A_log)
        y, window = open_window(conv_state, x, dt, A, B, C, self.D, index, horizon=horizon, unrolled=unrolled)
        return self._gate_and_project(_as_stored(y.reshape(z.shape)), z), window

    def step(
        self, u: jax.Array, state: Mamba2LayerState | Mamba2LayerWindow
    ) -> tuple[jax.Array, Mamba2LayerState | Mamba2LayerWindow]:
        """One step: u [B, D] -> [B, D] in the compute dtype, and the state after it."""
        z, xBC, dt = self._project(u)
        if isinstance(state, Mamba2LayerWindow):
            xBC, taps = self.conv.step(xBC, state.conv)
            x, B, C = self._split(_as_stored(xBC))
            y, window = attend(state, x, self._step_size(dt), -jnp.exp(self.A_log), B, C, self.D)
            return self._gate_and_project(_as_stored(y.reshape(z.shape)), z), dataclasses.replace(window, conv=taps)
        xBC, conv_state = self.conv(xBC[:, None], state.conv)
        x, B, C = self._split(xBC[:, 0])
        y, ssm_state = ssd_step(state.ssm, x, self._step_size(dt), -jnp.exp(self.A_log), B, C, D=self.D)
        return self._gate_and_project(y, z), Mamba2LayerState(conv=conv_state, ssm=ssm_state)

    def _project(self, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        inner, heads = self.config.inner_width, self.config.num_heads
        projected = self.in_proj(u)
        return projected[..., :inner], projected[..., inner:-heads], projected[..., -heads:]

    def _split(self, xBC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        x, B, C = jnp.split(xBC, [c.inner_width, c.inner_width + c.state_dim], axis=-1)
        return x.reshape(*x.shape[:-1], c.num_heads, c.head_dim), B[..., None, :], C[..., None, :]

    def _step_size(self, dt: jax.Array) -> jax.Array:
        wide = at_least_float32(self.dtype)
        return jax.nn.softplus(dt.astype(wide) + self.dt_bias.astype(wide))

    def _gate_and_project(self, y: jax.Array, z: jax.Array) -> jax.Array:
        wide = at_least_float32(self.dtype)
        gated = y.reshape(z.shape).astype(wide) * nn.silu(z.astype(wide))
        return self.out_proj(self.norm(gated))


def _as_stored(x: jax.Array) -> jax.Array:
    """x, to be kept in its own dtype: XLA on a GPU moves the cast behind the memory and stores float32 otherwise."""
    return jax.lax.optimization_barrier(x)


def _init_log_decay(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, *_DECAY_RATES))
