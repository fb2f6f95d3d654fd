"""The Mamba-2 sequence model of Drama (arXiv 2410.08893, section 2.2; Dao & Gu 2024 for the block).

stem(z_t, a_t), then per layer a residual block norm -> mixer, then a final norm. The residual stream, the norms and
the SSM state are held in at least float32, matrix products run in the compute dtype.

Shapes: B batch, T time, S latent, A actions, D width, I inner width, H heads, P head dim, N state dim, W conv width,
V = I + 2N channels of the convolution. The mixer has one group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax import checks
from drama_jax.action_space import ActionSpace
from drama_jax.backbones import gpu_rollout
from drama_jax.backbones.causal_conv import CausalConv
from drama_jax.backbones.mamba2_window import Mamba2LayerWindow, Mamba2Window, attend, open_window
from drama_jax.backbones.parts import BLOCK_EPS, STEM_EPS, Stem, check_inputs, init_dt_bias, uniform_fan_in
from drama_jax.config import BackboneConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32
from drama_jax.ssd import segment_index, ssd, ssd_step

_DECAY_RATES = (1.0, 16.0)


@flax.struct.dataclass
class Mamba2LayerState:
    """What one mixer remembers."""

    conv: jax.Array  # [B, W - 1, V] compute dtype: the last inputs of the convolution, oldest first
    ssm: jax.Array  # [B, H, P, N] float32 (float64 if computed in it)


@flax.struct.dataclass
class Mamba2State:
    """What the backbone remembers."""

    layers: tuple[Mamba2LayerState, ...]  # one per layer


class Mamba2Backbone(nn.Module):
    """The whole sequence model; see `drama_jax.backbones` for the interface."""

    config: BackboneConfig
    num_actions: ActionSpace
    dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declares the sub-modules."""
        wide = at_least_float32(self.dtype)
        self.stem = Stem(self.config.width, self.num_actions, self.dtype)
        self.layers = [Block(self.config, self.dtype) for _ in range(self.config.num_layers)]
        self.norm_f = rms_norm(BLOCK_EPS, wide)

    def initial_state(self, batch_size: int) -> Mamba2State:
        """The state before the first step of an episode: zeros."""
        c = self.config
        layer = Mamba2LayerState(
            conv=jnp.zeros((batch_size, c.conv_width - 1, c.inner_width + 2 * c.state_dim), self.dtype),
            ssm=jnp.zeros((batch_size, c.num_heads, c.head_dim, c.state_dim), at_least_float32(self.dtype)),
        )
        return Mamba2State(layers=(layer,) * c.num_layers)

    def __call__(
        self,
        latent: jax.Array,
        action: jax.Array,
        *,
        state: Mamba2State | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Mamba2State]:
        """Features of a sequence.

        Args:
          latent: `[B, T, S]` float, z_t.
          action: `[B, T]` int, a_t (float `[B, T, A]` if continuous), taken in z_t.
          state: the state before the first step; zeros if absent.
          segment_ids: optional `[B, T]` int; the state is dropped where the id changes, and `state` belongs to id 0.

        Returns:
          d_t `[B, T, D]` in at least float32, and the state after the last step.

        Raises:
          ValueError: if latent and action do not fit.
        """
        check_inputs(latent, action, segment_ids, axes=("B", "T"), num_actions=self.num_actions)
        if state is None:
            state = self.initial_state(latent.shape[0])
        self._check_state(state, latent.shape[0])
        index = None if segment_ids is None else segment_index(segment_ids)
        blocks = [
            functools.partial(layer, state=layer_state, index=index)
            for layer, layer_state in zip(self.layers, state.layers, strict=True)
        ]
        features, states = self._through(blocks, latent, action)
        return features, Mamba2State(layers=states)

    def open_window(
        self,
        latent: jax.Array,
        action: jax.Array,
        *,
        horizon: int,
        segment_ids: jax.Array | None = None,
        unrolled: bool = False,
        classes: int | None = None,
    ) -> tuple[jax.Array, Mamba2Window | gpu_rollout.GpuWindow]:
        """Features of a sequence, and a memory of it that makes the next `horizon` steps cheap.

        Args:
          latent: `[B, T, S]` float, z_t.
          action: `[B, T]` int, a_t (float `[B, T, A]` if continuous), taken in z_t.
          horizon: how many times `step` may be called with the window, static; features beyond it are NaN.
          segment_ids: optional `[B, T]` int; the past is dropped where the id changes.
          unrolled: for steps in a loop that is unrolled whole, where the window can be read only as far as it is
            filled; in any other loop it is slower, never wrong.
          classes: a promise that the latents of the steps are one-hot in groups of this many, for GPU kernels that
            count on it; without it they do not serve.

        Returns:
          d_t `[B, T, D]` in at least float32, and the window for `step` after the last step.

        Raises:
          ValueError: if latent and action do not fit, or the horizon is not positive.
        """
        check_inputs(latent, action, segment_ids, axes=("B", "T"), num_actions=self.num_actions)
        checks.integers("backbone", horizon=horizon)
        index = None if segment_ids is None else segment_index(segment_ids)
        discrete = isinstance(self.num_actions, int)
        if discrete and classes is not None and gpu_rollout.serves(self.config, self.dtype, latent.shape[-1], classes):
            index = jnp.zeros(action.shape, jnp.int32) if index is None else index
            return gpu_rollout.open_window(
                self.config, self.variables["params"], self.stem(latent, action), index,
                horizon=horizon, classes=classes, eps=BLOCK_EPS, dtype=self.dtype,
            )  # fmt: skip
        blocks = [
            functools.partial(layer.open_window, index=index, horizon=horizon, unrolled=unrolled)
            for layer in self.layers
        ]
        features, windows = self._through(blocks, latent, action)
        return features, Mamba2Window(layers=windows)

    def step(
        self, latent: jax.Array, action: jax.Array, state: Mamba2State | Mamba2Window | gpu_rollout.GpuWindow
    ) -> tuple[jax.Array, Mamba2State | Mamba2Window | gpu_rollout.GpuWindow]:
        """The feature of one step.

        Args:
          latent: `[B, S]` float, z_t.
          action: `[B]` int, a_t (float `[B, A]` if continuous).
          state: the state before the step, or a window from `open_window`.

        Returns:
          d_t `[B, D]` in at least float32, and the state after the step, of the kind given.

        Raises:
          ValueError: if latent and action do not fit.
        """
        check_inputs(latent, action, None, axes=("B",), num_actions=self.num_actions)
        self._check_state(state, latent.shape[0], Mamba2Window, gpu_rollout.GpuWindow)
        if isinstance(state, gpu_rollout.GpuWindow):
            feature, window = gpu_rollout.step(
                self.config, self.variables["params"], latent.astype(self.dtype), action, state,
                eps=(STEM_EPS, BLOCK_EPS),
            )  # fmt: skip
            return feature.astype(at_least_float32(self.dtype)), window
        memories: tuple[Mamba2LayerState | Mamba2LayerWindow, ...] = state.layers
        blocks = [
            functools.partial(layer.step, state=memory) for layer, memory in zip(self.layers, memories, strict=True)
        ]
        features, layers = self._through(blocks, latent, action)
        kind = Mamba2Window if isinstance(state, Mamba2Window) else Mamba2State
        return features, kind(layers=layers)

    def _check_state(self, state: Any, batch_size: int, *kinds: type) -> None:
        checks.instances("backbone", state=(state, (Mamba2State, *kinds)))
        if len(state.layers) != self.config.num_layers:
            raise ValueError(f"backbone: state must have {self.config.num_layers} layers, got {len(state.layers)}")
        for wanted, given in zip(self.initial_state(batch_size).layers, state.layers):
            if isinstance(given, Mamba2LayerState):
                checks.arrays("backbone, state", conv=(given.conv, wanted.conv.shape, "float"))
                checks.arrays("backbone, state", ssm=(given.ssm, wanted.ssm.shape, "float"))

    def _through(
        self, blocks: Iterable[Callable[[jax.Array], tuple[jax.Array, Any]]], latent: jax.Array, action: jax.Array
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Stem, blocks on the residual stream, final norm: features, and what each block remembers."""
        residual = self.stem(latent, action)
        memories = []
        for block in blocks:
            update, memory = block(residual)
            residual = residual + update.astype(residual.dtype)
            memories.append(memory)
        return self.norm_f(residual), tuple(memories)


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
