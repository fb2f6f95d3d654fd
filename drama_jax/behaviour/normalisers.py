"""Running statistics: of the actor's input, and of the spread of returns. F feature size."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from drama_jax import checks
from drama_jax.config import BehaviourConfig

CLIP = 10.0
_EPS = 1e-8


@flax.struct.dataclass
class InputNormaliser:
    """Mean and variance of every feature, over all rows seen."""

    mean: jax.Array  # [F] f32
    variance: jax.Array  # [F] f32
    count: jax.Array  # [] f32: rows seen, starting at 1e-4


@flax.struct.dataclass
class ReturnScale:
    """Moving averages of a low and a high percentile of the lambda-returns, from 0 and not debiased."""

    lower: jax.Array  # [] f32
    upper: jax.Array  # [] f32

    @property
    def spread(self) -> jax.Array:
        """upper - lower, []."""
        return self.upper - self.lower


def init_input(feature_size: int, dtype: DTypeLike = jnp.float32) -> InputNormaliser:
    """Mean 0, variance 1, next to no weight."""
    return InputNormaliser(
        mean=jnp.zeros(feature_size, dtype), variance=jnp.ones(feature_size, dtype), count=jnp.asarray(1e-4, dtype)
    )


def update(normaliser: InputNormaliser, features: jax.Array) -> InputNormaliser:
    """Merges the mean and (biased) variance of all rows of features [..., F].

    The merge is that of Chan, Golub and LeVeque 1979. The float32 count stops growing by single rows at 2^24.
    """
    checks.arrays("normalisers.update", features=(features, (..., normaliser.mean.shape[0]), "float"))
    rows = features.reshape(-1, features.shape[-1]).astype(normaliser.mean.dtype)
    batch_mean, batch_variance = jnp.mean(rows, axis=0), jnp.var(rows, axis=0)
    batch_count = float(rows.shape[0])
    count = normaliser.count + batch_count
    delta = batch_mean - normaliser.mean
    squares = normaliser.variance * normaliser.count + batch_variance * batch_count
    between = jnp.square(delta) * (normaliser.count * batch_count / count)
    return InputNormaliser(
        mean=normaliser.mean + delta * (batch_count / count), variance=(squares + between) / count, count=count
    )


def apply(normaliser: InputNormaliser, features: jax.Array) -> jax.Array:
    """(x - mean) / standard deviation, clipped to +-10; [..., F] -> [..., F] in the statistics' dtype."""
    checks.arrays("normalisers.apply", features=(features, (..., normaliser.mean.shape[0]), "float"))
    features = features.astype(normaliser.mean.dtype)
    return jnp.clip((features - normaliser.mean) * scale(normaliser), -CLIP, CLIP)


def scale(normaliser: InputNormaliser) -> jax.Array:
    """1 / standard deviation, [F]."""
    return jax.lax.rsqrt(normaliser.variance + _EPS)


def init_return_scale(dtype: DTypeLike = jnp.float32) -> ReturnScale:
    """Both percentiles 0."""
    return ReturnScale(lower=jnp.zeros((), dtype), upper=jnp.zeros((), dtype))


def update_return_scale(config: BehaviourConfig, scale: ReturnScale, returns: jax.Array) -> ReturnScale:
    """Moves both averages towards the percentiles of `returns` [...].

    A percentile p of n numbers is the k-th smallest, k = int(p n) counted from 1 (and at least 1): no interpolation.
    """
    checks.arrays("normalisers.update_return_scale", returns=(returns, (...,), "float"))
    ordered = jnp.sort(returns.reshape(-1))
    decay = config.return_scale_decay

    def move(average: jax.Array, percentile: float) -> jax.Array:
        k = max(1, int(percentile * ordered.size))
        return decay * average + (1 - decay) * ordered[k - 1].astype(average.dtype)

    low, high = config.return_percentiles
    return ReturnScale(lower=move(scale.lower, low), upper=move(scale.upper, high))
