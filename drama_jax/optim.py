"""LaProp with linear warm-up and global-norm clipping, as optax gradient transformations.

LaProp: Ziyin, Wang and Ueda 2020, arXiv 2002.04839, algorithm 1. It normalises the gradient first and averages the
normalised gradient second, so that the two averages do not interact as they do in Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from drama_jax import checks
from drama_jax.config import OptimizerConfig

LearningRate = float | jax.Array | Callable[[jax.Array], float | jax.Array]
"""A number, a traced scalar, or a schedule of the 0-based number of the update."""


class ClipState(NamedTuple):
    """State of `clip_by_global_norm`."""

    norm: jax.Array  # [] parameters' dtype: global norm of the last gradient, before clipping


class LaPropState(NamedTuple):
    """State of `laprop`."""

    num_updates: jax.Array  # [] i32: updates made so far
    rate_average: jax.Array  # [] parameters' dtype: E, moving average of the learning rate
    momentum: chex.ArrayTree  # like the parameters: m, moving average of learning rate * normalised gradient
    square: chex.ArrayTree  # like the parameters: v, moving average of the squared gradient


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), norm being that of all gradients together.

    This is `torch.nn.utils.clip_grad_norm_`. The state keeps the norm before clipping, see `gradient_norm`.
    """

    checks.numbers("clip_by_global_norm", 0, max_norm=max_norm)

    def init(params: chex.ArrayTree) -> ClipState:
        return ClipState(norm=jnp.zeros((), _dtype(params)))

    def update(
        updates: chex.ArrayTree, state: ClipState, params: chex.ArrayTree | None = None
    ) -> tuple[chex.ArrayTree, ClipState]:
        del state, params
        norm = optax.tree.norm(updates)
        scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), ClipState(norm=norm)

    return optax.GradientTransformation(init, update)


def laprop(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-20,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """LaProp (arXiv 2002.04839). With gradient g, learning rate lr and t = 1, 2, ...:

        v = b2 v + (1 - b2) g^2
        u = g / (sqrt(v / (1 - b2^t)) + eps)
        m = b1 m + (1 - b1) lr u
        E = b1 E + (1 - b1) lr
        p = p - m lr / E
        p = p - weight_decay p

    Where it differs from the published algorithm, with the released Drama code: `eps` is added outside the square
    root; the learning rate enters the momentum, and E replaces the correction 1 - b1^t (the same thing while the
    learning rate is constant; during warm-up, steps taken at a smaller rate weigh less); the decay is not multiplied
    by the learning rate. Unlike both, u = 0 where v = 0: a gradient whose square underflows (below about 1e-19 in
    float32) would otherwise be divided by `eps` alone. A parameter whose gradient is always 0 moves by decay only.

    Args:
      learning_rate: a float, a traced scalar, or a schedule of the 0-based number of the update. The state's structure
        does not depend on it.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the squared gradient, in (0, 1).
      eps: added to the denominator.
      weight_decay: share of every parameter removed per update; `update` then needs `params`.

    Raises:
      ValueError: if b1 or b2 is out of range, or if `params` is missing while there is weight decay.
    """
    if not (0 <= b1 < 1 and 0 < b2 < 1):
        raise ValueError(f"laprop needs 0 <= b1 < 1 and 0 < b2 < 1, got b1={b1}, b2={b2}")

    checks.numbers("laprop", 0, eps=eps, weight_decay=weight_decay)
    if not callable(learning_rate):
        checks.numbers("laprop", 0, learning_rate=learning_rate)

    def init(params: chex.ArrayTree) -> LaPropState:
        return LaPropState(
            num_updates=jnp.zeros((), jnp.int32),
            rate_average=jnp.zeros((), _dtype(params)),
            momentum=optax.tree.zeros_like(params),
            square=optax.tree.zeros_like(params),
        )

    def update(
        updates: chex.ArrayTree, state: LaPropState, params: chex.ArrayTree | None = None
    ) -> tuple[chex.ArrayTree, LaPropState]:
        if weight_decay and params is None:
            raise ValueError("laprop with weight_decay needs the parameters: call update(gradients, state, params)")
        dtype = state.rate_average.dtype
        rate = learning_rate(state.num_updates) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, dtype)
        rate_average = b1 * state.rate_average + (1 - b1) * rate
        step_size = jnp.where(rate_average > 0, rate / jnp.where(rate_average > 0, rate_average, 1.0), 0.0)
        # 1 - b2^t through expm1: in float32 the plain difference is wrong by 5e-5 of its value at t = 1.
        correction = -jnp.expm1((state.num_updates + 1).astype(dtype) * math.log(b2))

        square = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), updates, state.square)

        def average(g: jax.Array, v: jax.Array, m: jax.Array) -> jax.Array:
            scaled = g / (jnp.sqrt(v / correction.astype(v.dtype)) + eps)
            return b1 * m + (1 - b1) * rate.astype(m.dtype) * jnp.where(v > 0, scaled, 0.0)

        momentum = jax.tree.map(average, updates, square, state.momentum)
        steps = jax.tree.map(lambda m: -step_size.astype(m.dtype) * m, momentum)
        if weight_decay:
            steps = jax.tree.map(lambda s, p: s - weight_decay * (p + s), steps, params)
        return steps, LaPropState(state.num_updates + 1, rate_average, momentum, square)

    return optax.GradientTransformation(init, update)


def warmup(learning_rate: float | jax.Array, warmup_updates: int) -> Callable[[jax.Array], jax.Array]:
    """Linear warm-up: the k-th update (k = 1, 2, ...) uses learning_rate * min(1, k / warmup_updates)."""

    checks.numbers("warmup", 0, learning_rate=learning_rate)
    checks.integers("warmup", 0, warmup_updates=warmup_updates)

    def schedule(count: jax.Array) -> jax.Array:
        rate = jnp.asarray(learning_rate)
        share = jnp.minimum(1.0, (count + 1).astype(rate.dtype) / max(warmup_updates, 1))
        return rate * share

    return schedule


def make_optimizer(
    config: OptimizerConfig, learning_rate: float | jax.Array | None = None
) -> optax.GradientTransformation:
    """Clipping, then LaProp with linear warm-up.

    All parameters are treated as one flat vector: a handful of kernels for the whole model in place of several for
    each of its arrays, and the norm is one reduction. Parameters must therefore share one dtype.

    Args:
      config: clipping, warm-up and LaProp settings.
      learning_rate: overrides `config.learning_rate`; may be a traced scalar.
    """
    checks.instances("make_optimizer", config=(config, OptimizerConfig))
    rate = config.learning_rate if learning_rate is None else learning_rate
    return with_schedule(config, warmup(rate, config.warmup_updates))


def with_schedule(config: OptimizerConfig, learning_rate: LearningRate) -> optax.GradientTransformation:
    """`make_optimizer` with a learning rate of one's own, whatever `config` says of it and of warm-up."""
    return optax.flatten(
        optax.chain(
            clip_by_global_norm(config.max_grad_norm),
            laprop(learning_rate, config.b1, config.b2, config.eps, config.weight_decay),
        )
    )


def gradient_norm(state: optax.OptState) -> jax.Array:
    """Global norm [] of the last gradient before clipping, from the state of a `make_optimizer` transformation."""
    clip_state = state[0]  # type: ignore[index]
    return clip_state.norm


def _dtype(params: chex.ArrayTree) -> jnp.dtype:
    """The dtype that the parameters share."""
    dtypes = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in jax.tree.leaves(params)})
    if len(dtypes) != 1:
        raise ValueError(f"the optimiser's parameters must be arrays of one dtype, got {', '.join(dtypes) or 'none'}")
    return jnp.result_type(*jax.tree.leaves(params))
