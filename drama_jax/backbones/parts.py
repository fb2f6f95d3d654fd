"""What several backbones are made of: the stem, layers, initialisers, and the check of their arguments.

Shapes: S latent, A actions, D width.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import linen as nn

from drama_jax import action_space, checks
from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.nn import rms_norm
from drama_jax.precision import at_least_float32

BLOCK_EPS = 1e-5
"""Of the norms of residual blocks, and of the last one."""
STEM_EPS = 1e-6
"""Of the stem's norm."""
_STEP_SIZES = (1e-3, 0.1)
_SMALLEST_STEP_SIZE = 1e-4


class Stem(nn.Module):
    """SiLU(RMSNorm(W [latent, action] + b)), the action one-hot or continuous, [..., S] and [...] -> [..., D]."""

    width: int
    num_actions: ActionSpace
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, latent: jax.Array, action: jax.Array) -> jax.Array:
        """Embeds latent and action in the residual stream."""
        wide = at_least_float32(self.dtype)
        x = embed(self, latent, action)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), wide)
        return nn.silu(rms_norm(STEM_EPS, wide, name="norm")(x + bias.astype(wide)))


def embed(stem: Any, latent: jax.Array, action: jax.Array) -> jax.Array:
    """W [latent, action] in at least float32, where W is the parameter "kernel" of `stem`.

    Args:
      stem: the module, with `width`, `num_actions` and `dtype`.
      latent: `[..., S]` float.
      action: `[...]` int, or `[..., A]` float if continuous.
    """
    size, wide = latent.shape[-1], at_least_float32(stem.dtype)
    if stem.has_variable("params", "kernel"):
        check_rows(stem.get_variable("params", "kernel").shape[0], size, stem.num_actions)
    rows = size + action_space.size(stem.num_actions)
    kernel = stem.param("kernel", uniform_fan_in(), (rows, stem.width), wide)
    embedded = jnp.matmul(latent.astype(stem.dtype), kernel[:size].astype(stem.dtype), preferred_element_type=wide)
    return embedded + embed_action(kernel[size:].astype(wide), action, stem.num_actions)


def check_rows(rows: int, size: int, num_actions: ActionSpace) -> None:
    """Raises a ValueError if a stem's kernel of so many rows is not for latents of this size and these actions."""
    if rows != size + action_space.size(num_actions):
        raise ValueError(
            f"backbone: these parameters are for S + A = {rows}, got latents of S = {size} and "
            f"A = {action_space.size(num_actions)} actions"
        )


def embed_action(kernel: jax.Array, action: jax.Array, num_actions: ActionSpace) -> jax.Array:
    """The rows [A, D] of a stem's kernel for actions [...] int, or [..., A] continuous: their product, [..., D]."""
    if not isinstance(num_actions, Continuous):
        return lookup(kernel, action)
    return jnp.matmul(action.astype(kernel.dtype), kernel, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def lookup(table: jax.Array, row: jax.Array) -> jax.Array:
    """table[row], with the gradient as a product with one-hot rows.

    The automatic gradient is a scatter of thousands of rows onto a few, slow and in random order on a GPU.
    """
    return jnp.take(table, row, axis=0)


def _lookup_forward(table: jax.Array, row: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The table rides along for its shape and dtype alone.
    return lookup(table, row), (table, row)


def _lookup_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    table, row = saved
    one_hot = jax.nn.one_hot(row.reshape(-1), table.shape[0], dtype=gradient.dtype)
    flat = gradient.reshape(-1, table.shape[1])
    return jnp.matmul(one_hot.T, flat, precision=jax.lax.Precision.HIGHEST), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def check_inputs(
    latent: jax.Array,
    action: jax.Array,
    segment_ids: jax.Array | None,
    axes: tuple[str, ...],
    num_actions: ActionSpace,
) -> None:
    """Raises a TypeError or ValueError if latents [.., S], actions and ids do not fit; `axes` are the leading ones."""
    checks.arrays(
        "backbone",
        latent=(latent, (*axes, "S"), "float"),
        action=(action, *action_space.spec(num_actions, axes)),  # indices, not one-hot, if discrete
        segment_ids=(segment_ids, axes, "integer or None"),
    )


def uniform_fan_in(scale: float = 1.0) -> nn.initializers.Initializer:
    """U(+-sqrt(scale / fan_in)); scale 1 is PyTorch's default for a linear layer."""
    return nn.initializers.variance_scaling(scale / 3.0, "fan_in", "uniform")


def init_dt_bias(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Inverse softplus of log-uniform step sizes (Dao & Gu 2024, code)."""
    low, high = map(math.log, _STEP_SIZES)
    step_size = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), _SMALLEST_STEP_SIZE)
    return step_size + jnp.log(-jnp.expm1(-step_size))


def layer_norm(epsilon: float, dtype: jax.typing.DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """A module that normalises the last axis in `dtype`; its input must be of `dtype` already, at least float32."""
    return nn.LayerNorm(
        epsilon, dtype=dtype, param_dtype=dtype, use_fast_variance=False, force_float32_reductions=False, name=name
    )


def linear(
    features: int, dtype: jax.typing.DTypeLike, name: str | None = None, *, bias_from: int | None = None
) -> nn.Dense:
    """A linear layer with PyTorch's default initialisation, U(+-1 / sqrt(fan_in)), its bias too if it has one.

    Args:
      bias_from: fan_in, for a layer with a bias.
    """

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        limit = 1 / math.sqrt(bias_from or 1)
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return nn.Dense(
        features,
        use_bias=bias_from is not None,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        kernel_init=uniform_fan_in(),
        bias_init=uniform,
        name=name,
    )
