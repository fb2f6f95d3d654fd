"""A short causal convolution over time, one filter per channel, with a carried state.

Shapes: B batch, T time, W filter width, V channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax.precision import at_least_float32


class CausalConv(nn.Module):
    """SiLU of a depthwise causal convolution over time with a carried state."""

    width: int
    channels: int
    dtype: jax.typing.DTypeLike

    def setup(self) -> None:
        """Declares the parameters."""
        limit = 1 / math.sqrt(self.width)
        wide = at_least_float32(self.dtype)

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        self.kernel = self.param("kernel", uniform, (self.width, self.channels), wide)  # kernel[-1]: newest input
        self.bias = self.param("bias", uniform, (self.channels,), wide)

    def __call__(self, u: jax.Array, state: jax.Array, index: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Convolves within segments.

        Args:
          u: `[B, T, V]`.
          state: `[B, W - 1, V]`, the inputs before the first step, oldest first.
          index: optional `[B, T]` int32 from `segment_index`; `state` belongs to index 0.

        Returns:
          `[B, T, V]` in the compute dtype, and the last W - 1 inputs, zero where another segment than the last one's.
        """
        time, before = u.shape[1], self.width - 1
        inputs = jnp.concatenate([state.astype(self.dtype), u.astype(self.dtype)], axis=1)
        owner = None if index is None else jnp.pad(index, ((0, 0), (before, 0)))
        taps = [inputs[:, tap : tap + time] for tap in range(self.width)]
        if owner is not None and index is not None:
            for tap in range(before):
                taps[tap] = jnp.where((owner[:, tap : tap + time] == index)[..., None], taps[tap], 0)
        last = inputs[:, time:]
        if owner is not None:
            last = jnp.where((owner[:, time:] == owner[:, -1:])[..., None], last, 0)
        return self._convolve(taps), last

    def step(self, u: jax.Array, taps: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """One step: u [B, V] and the W - 1 inputs before it, oldest first -> [B, V], and the W - 1 newest."""
        taps = (*taps, u.astype(self.dtype))
        return self._convolve(taps), taps[1:]

    def _convolve(self, taps: Iterable[jax.Array]) -> jax.Array:
        wide = at_least_float32(self.dtype)
        y = _sum_of_products(self.kernel.astype(wide), tuple(taps)) + self.bias.astype(wide)
        return nn.silu(y).astype(self.dtype)


@jax.custom_vjp
def _sum_of_products(kernel: jax.Array, taps: tuple[jax.Array, ...]) -> jax.Array:
    """sum over taps of kernel[tap] * taps[tap]: [W, V] and W times [.., V] -> [.., V] in the dtype of `kernel`."""
    # W shifted products: XLA fuses them into one pass, where a grouped convolution call is far slower.
    products = [weight * tap.astype(kernel.dtype) for weight, tap in zip(kernel, taps, strict=True)]
    return functools.reduce(jnp.add, products)


def _sum_of_products_forward(
    kernel: jax.Array, taps: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, tuple[jax.Array, ...]]]:
    return _sum_of_products(kernel, taps), (kernel, taps)


def _sum_of_products_backward(
    saved: tuple[jax.Array, tuple[jax.Array, ...]], gradient: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    kernel, taps = saved
    by_taps = tuple((weight * gradient).astype(tap.dtype) for weight, tap in zip(kernel, taps, strict=True))
    # Behind the barrier each sum multiplies while it adds; otherwise XLA writes the products of all taps out first.
    gradient, taps = jax.lax.optimization_barrier((gradient, taps))
    axes = tuple(range(gradient.ndim - 1))
    by_kernel = jnp.stack([(gradient * tap.astype(gradient.dtype)).sum(axis=axes) for tap in taps])
    return by_kernel, by_taps


_sum_of_products.defvjp(_sum_of_products_forward, _sum_of_products_backward)
