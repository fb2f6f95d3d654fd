"""What the recurrent backbones other than Mamba-2 share: stem, residual blocks with a state each, a final norm.

A block is a module with `__call__(residual [B, T, D], state, index) -> (update [B, T, D], state)` and
`step(residual [B, D], state) -> (update [B, D], state)`; the update is added to the residual stream, which is held in
at least float32. Stem and final norm are those of Mamba-2, so that a comparison is one of what mixes over time.

Shapes: B batch, T time, S latent, D width.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax import checks
from drama_jax.action_space import ActionSpace
from drama_jax.backbones.parts import BLOCK_EPS, Stem, check_inputs
from drama_jax.config import BackboneConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32
from drama_jax.ssd import segment_index


@flax.struct.dataclass
class RecurrentState:
    """What a recurrent backbone remembers: a constant amount, whatever the number of steps."""

    layers: tuple[Any, ...]  # one state per layer; every array [B, ...]


class ResidualBackbone(nn.Module):
    """The whole sequence model but for its blocks; see `drama_jax.backbones` for the interface."""

    config: BackboneConfig
    num_actions: ActionSpace
    dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declares the sub-modules."""
        self.stem = Stem(self.config.width, self.num_actions, self.dtype)
        self.layers = [self.block(layer) for layer in range(self.config.num_layers)]
        self.norm_f = rms_norm(BLOCK_EPS, at_least_float32(self.dtype))

    def block(self, layer: int) -> nn.Module:
        """The module of one block."""
        raise NotImplementedError

    def initial_layer_state(self, batch_size: int) -> Any:
        """The state of one block before the first step of an episode."""
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> RecurrentState:
        """The state before the first step of an episode: zeros."""
        checks.integers("backbone", batch_size=batch_size)
        return RecurrentState(layers=(self.initial_layer_state(batch_size),) * self.config.num_layers)

    def __call__(
        self,
        latent: jax.Array,
        action: jax.Array,
        *,
        state: RecurrentState | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, RecurrentState]:
        """Features of a sequence.

        Args:
          latent: `[B, T, S]` float, z_t.
          action: `[B, T]` int, a_t (float `[B, T, A]` if continuous), taken in z_t.
          state: the state before the first step; zeros if absent.
          segment_ids: optional `[B, T]` int; the state is dropped where the id changes, and `state` belongs to id 0.

        Returns:
          d_t `[B, T, D]` in at least float32, and the state after the last step.

        Raises:
          TypeError, ValueError: if latent, action and state do not fit.
        """
        check_inputs(latent, action, segment_ids, axes=("B", "T"), num_actions=self.num_actions)
        if state is None:
            state = self.initial_state(latent.shape[0])
        self._check_state(state, latent.shape[0])
        index = None if segment_ids is None else segment_index(segment_ids)
        residual, states = self.stem(latent, action), []
        for block, memory in zip(self.layers, state.layers, strict=True):
            update, memory = block(residual, memory, index)
            residual = residual + update.astype(residual.dtype)
            states.append(memory)
        return self.norm_f(residual), RecurrentState(layers=tuple(states))

    def open_window(
        self,
        latent: jax.Array,
        action: jax.Array,
        *,
        horizon: int,
        segment_ids: jax.Array | None = None,
        unrolled: bool = False,
        classes: int | None = None,
    ) -> tuple[jax.Array, RecurrentState]:
        """The call from an empty past, which needs no preparation here: the window is the recurrent state.

        Args:
          latent: `[B, T, S]` float, z_t.
          action: `[B, T]` int, a_t (float `[B, T, A]` if continuous), taken in z_t.
          horizon: at least 1; any number of steps may follow.
          segment_ids: optional `[B, T]` int; the past is dropped where the id changes.
          unrolled: makes no difference.
          classes: makes no difference.

        Returns:
          d_t `[B, T, D]` in at least float32, and the state after the last step.

        Raises:
          TypeError, ValueError: if latent and action do not fit, or the horizon is not positive.
        """
        del unrolled, classes
        checks.integers("backbone", horizon=horizon)
        return self(latent, action, segment_ids=segment_ids)

    def step(self, latent: jax.Array, action: jax.Array, state: RecurrentState) -> tuple[jax.Array, RecurrentState]:
        """The feature of one step.

        Args:
          latent: `[B, S]` float, z_t.
          action: `[B]` int, a_t (float `[B, A]` if continuous).
          state: the state before the step.

        Returns:
          d_t `[B, D]` in at least float32, and the state after the step.

        Raises:
          TypeError, ValueError: if latent, action and state do not fit.
        """
        check_inputs(latent, action, None, axes=("B",), num_actions=self.num_actions)
        self._check_state(state, latent.shape[0])
        residual, states = self.stem(latent, action), []
        for block, memory in zip(self.layers, state.layers, strict=True):
            update, memory = block.step(residual, memory)
            residual = residual + update.astype(residual.dtype)
            states.append(memory)
        return self.norm_f(residual), RecurrentState(layers=tuple(states))

    def _check_state(self, state: Any, batch_size: int) -> None:
        checks.instances("backbone", state=(state, RecurrentState))
        if len(state.layers) != self.config.num_layers:
            raise ValueError(f"backbone: state must have {self.config.num_layers} layers, got {len(state.layers)}")
        wanted = jax.eval_shape(lambda: self.initial_layer_state(batch_size))
        for given in state.layers:
            checks.instances("backbone", state_layer=(given, type(wanted)))
            for name, array in vars(wanted).items():
                checks.arrays("backbone, state", **{name: (getattr(given, name), array.shape, "float")})
