"""The Mamba-2 sequence model of Drama (arXiv 2410.08893, section 2.2; Dao & Gu 2024 for the block).

stem(z_t, a_t), then per layer a residual block norm -> mixer, then a final norm. The residual stream, the norms and
the SSM state are held in at least float32, matrix products run in the compute dtype.

Shapes: B batch, T time, S latent, A actions, D width, I inner width, H heads, P head dim, N state dim, W conv width,
V = I + 2N channels of the convolution. The mixer has one group.
"""

from __future__ import annotations

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
from drama_jax.backbones.mamba2_mixer import Block, Mamba2LayerState, Mamba2Mixer
from drama_jax.backbones.mamba2_window import Mamba2LayerWindow, Mamba2Window
from drama_jax.backbones.parts import BLOCK_EPS, STEM_EPS, Stem, check_inputs
from drama_jax.config import BackboneConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32
from drama_jax.ssd import segment_index

__all__ = ["Block", "Mamba2Backbone", "Mamba2LayerState", "Mamba2Mixer", "Mamba2State"]


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
