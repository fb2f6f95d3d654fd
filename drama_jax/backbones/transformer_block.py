"""What the transformer backbone is made of: its stem, and a block of attention and feed-forward layers.

Shapes and equations as in `backbones.transformer`.
"""

from __future__ import annotations

import math

import flax
import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax.action_space import ActionSpace
from drama_jax.backbones.parts import embed, layer_norm, linear
from drama_jax.config import BackboneConfig
from drama_jax.precision import at_least_float32

_STEM_EPS = 1e-5
BLOCK_EPS = 1e-6
"""Of the norms of the blocks, and of the one before the first."""


@flax.struct.dataclass
class TransformerLayerCache:
    """What one layer remembers of the steps of the current segment, oldest first."""

    keys: jax.Array  # [B, S, I] compute dtype
    values: jax.Array  # [B, S, I] compute dtype


class TransformerStem(nn.Module):
    """LN(W ReLU(LN(W [latent, action]))), the action one-hot or continuous.

    [..., S] and [...] -> [..., D] in at least float32.
    """

    width: int
    num_actions: ActionSpace
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, latent: jax.Array, action: jax.Array) -> jax.Array:
        """Embeds latent and action."""
        wide = at_least_float32(self.dtype)
        x = nn.relu(layer_norm(_STEM_EPS, wide, "norm")(embed(self, latent, action)))
        return layer_norm(_STEM_EPS, wide, "norm_out")(linear(self.width, self.dtype, "out")(x).astype(wide))


class TransformerBlock(nn.Module):
    """Attention and feed-forward part, each with its residual connection and a norm behind it."""

    config: BackboneConfig
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares the sub-modules."""
        c, wide = self.config, at_least_float32(self.dtype)
        self.query, self.key, self.value = (linear(c.mixer_size, self.dtype) for _ in range(3))
        self.out = linear(c.width, self.dtype)
        self.norm_attention = layer_norm(BLOCK_EPS, wide)
        self.hidden = linear(c.feedforward_size, self.dtype, bias_from=c.width)
        self.project = linear(c.width, self.dtype, bias_from=c.feedforward_size)
        self.norm = layer_norm(BLOCK_EPS, wide)

    def __call__(
        self, x: jax.Array, cache: TransformerLayerCache | None, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Over a sequence.

        Args:
          x: `[B, T, D]` at least float32.
          cache: S steps before it, or None for none.
          mask: `[B, T, S + T]` bool, what each step may see of the cache and the sequence.

        Returns:
          `[B, T, D]`, and the keys and values of cache and sequence, `[B, S + T, I]`.
        """
        keys, values = self.key(x), self.value(x)
        if cache is not None:
            keys = jnp.concatenate([cache.keys.astype(keys.dtype), keys], axis=1)
            values = jnp.concatenate([cache.values.astype(values.dtype), values], axis=1)
        return self._behind(x, self._attend(self.query(x), keys, values, mask)), keys, values

    def step(
        self, x: jax.Array, cache: TransformerLayerCache, length: jax.Array
    ) -> tuple[jax.Array, TransformerLayerCache]:
        """One step: x [B, D], and how many slots are filled [B] -> [B, D], the cache with this step."""
        rows = jnp.arange(x.shape[0])
        keys = cache.keys.at[rows, length].set(self.key(x).astype(cache.keys.dtype), mode="drop")
        values = cache.values.at[rows, length].set(self.value(x).astype(cache.values.dtype), mode="drop")
        mask = jnp.arange(keys.shape[1], dtype=jnp.int32) <= length[:, None]
        attended = self._attend(self.query(x)[:, None], keys, values, mask[:, None])
        return self._behind(x, attended[:, 0]), TransformerLayerCache(keys=keys, values=values)

    def _attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        """Queries [B, T, I] on keys and values [B, S, I] through a mask [B, T, S] -> [B, T, I]."""
        wide, heads = at_least_float32(self.dtype), self.config.num_heads
        query, keys, values = (a.reshape(*a.shape[:-1], heads, -1).astype(self.dtype) for a in (query, keys, values))
        scores = jnp.einsum("bthp,bshp->bhts", query, keys, preferred_element_type=wide)
        weights = nn.softmax(scores / math.sqrt(self.config.head_dim), where=mask[:, None], axis=-1)
        weights = self._drop(weights, self.config.attention_dropout)
        y = jnp.einsum("bhts,bshp->bthp", weights.astype(self.dtype), values)
        return y.reshape(*y.shape[:2], -1)

    def _behind(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = self.norm_attention(x + self._drop(self.out(attended).astype(x.dtype), self.config.dropout))
        added = self.project(nn.relu(self.hidden(x))).astype(x.dtype)
        return self.norm(x + self._drop(added, self.config.dropout))

    def _drop(self, x: jax.Array, rate: float) -> jax.Array:
        """Zero in a share of x, the rest scaled so that the expectation stays; x itself where nothing is dropped."""
        if rate == 0 or not self.has_rng("dropout"):
            return x
        return jnp.where(jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape), x / (1 - rate), 0)
