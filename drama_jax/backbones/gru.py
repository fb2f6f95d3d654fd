"""A recurrent sequence model: gated recurrent units in residual blocks.

The cell is that of the recurrent world models that Drama is compared with (DreamerV3, arXiv 2301.04104, whose cell is
DreamerV2's, arXiv 2010.02193): one layer norm over all three gates, and an update gate that begins nearly closed,

    r, c, u = LayerNorm(W x_t + U h_(t-1))
    v = sigmoid(u - 1)
    h_t = v tanh(sigmoid(r) c) + (1 - v) h_(t-1)

Each step needs the one before, so that the form over a sequence is a loop; what does not depend on it is computed for
all steps at once.

Shapes: B batch, T time, D width, I hidden width.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax.backbones.parts import BLOCK_EPS, uniform_fan_in
from drama_jax.backbones.residual import ResidualBackbone
from drama_jax.config import BackboneConfig
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32

_GATE_EPS = 1e-3
_UPDATE_BIAS = -1.0


@flax.struct.dataclass
class GruLayerState:
    """What one cell remembers."""

    hidden: jax.Array  # [B, I] float32 (float64 if computed in it)


class GruBackbone(ResidualBackbone):
    """The whole sequence model; see `drama_jax.backbones` for the interface."""

    def block(self, layer: int) -> nn.Module:
        """Norm, cell, output projection."""
        del layer
        return GruBlock(self.config, self.dtype)

    def initial_layer_state(self, batch_size: int) -> GruLayerState:
        """Zeros."""
        return GruLayerState(hidden=jnp.zeros((batch_size, self.config.mixer_size), at_least_float32(self.dtype)))


class GruBlock(nn.Module):
    """W_o GRU(RMSNorm(residual))."""

    config: BackboneConfig
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares sub-modules and parameters."""
        c, wide = self.config, at_least_float32(self.dtype)
        gates = 3 * c.mixer_size
        self.norm = rms_norm(BLOCK_EPS, wide)
        self.in_proj = nn.Dense(gates, use_bias=False, dtype=self.dtype, param_dtype=wide, kernel_init=uniform_fan_in())
        self.recurrent = self.param("recurrent", uniform_fan_in(), (c.mixer_size, gates), wide)
        self.gate_scale = self.param("gate_scale", nn.initializers.ones, (gates,), wide)
        self.gate_bias = self.param("gate_bias", nn.initializers.zeros, (gates,), wide)
        self.out_proj = nn.Dense(
            c.width,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=wide,
            kernel_init=uniform_fan_in(1.0 / c.num_layers),
        )

    def __call__(
        self, residual: jax.Array, state: GruLayerState, index: jax.Array | None
    ) -> tuple[jax.Array, GruLayerState]:
        """Over a sequence: residual [B, T, D], segment index [B, T] -> update [B, T, D], state after it."""
        inputs = self.in_proj(self.norm(residual))
        changed = jnp.zeros(inputs.shape[:2], bool)
        if index is not None:
            changed = jnp.diff(index, axis=1, prepend=0) > 0
        weights = self.recurrent, self.gate_scale, self.gate_bias

        def body(hidden: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, changed = now
            hidden = _cell(x, jnp.where(changed[:, None], 0, hidden), *weights)
            return hidden, hidden.astype(self.dtype)

        start = state.hidden.astype(at_least_float32(self.dtype))
        hidden, outputs = jax.lax.scan(body, start, (inputs.swapaxes(0, 1), changed.T))
        return self.out_proj(outputs.swapaxes(0, 1)), GruLayerState(hidden=hidden)

    def step(self, residual: jax.Array, state: GruLayerState) -> tuple[jax.Array, GruLayerState]:
        """One step: residual [B, D] -> update [B, D], state after it."""
        before = state.hidden.astype(at_least_float32(self.dtype))
        x = self.in_proj(self.norm(residual))
        hidden = _cell(x, before, self.recurrent, self.gate_scale, self.gate_bias)
        return self.out_proj(hidden.astype(self.dtype)), GruLayerState(hidden=hidden)


def _cell(x: jax.Array, hidden: jax.Array, recurrent: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The next hidden state [B, I], from projected inputs [B, 3I] and the state before; products in x's dtype."""
    wide = hidden.dtype
    gates = x.astype(wide) + jnp.matmul(hidden.astype(x.dtype), recurrent.astype(x.dtype), preferred_element_type=wide)
    centred = gates - jnp.mean(gates, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    gates = centred * jax.lax.rsqrt(variance + _GATE_EPS) * scale.astype(wide) + bias.astype(wide)
    reset, candidate, update = jnp.split(gates, 3, axis=-1)
    update = nn.sigmoid(update + _UPDATE_BIAS)
    return update * jnp.tanh(nn.sigmoid(reset) * candidate) + (1 - update) * hidden
