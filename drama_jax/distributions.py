"""Discrete distributions: mixed categoricals, straight-through samples, KL with free bits, symlog two-hot.

In shapes, K categoricals, C classes, A actions, `...` any leading axes. Every function computes in at least float32
(`bfloat16` inputs are widened, `float64` stays `float64`), since exponentials and logarithms lose too much below it.

Sources: Drama (arXiv 2410.08893, section 2); two-hot, symlog, unimix and free bits as in DreamerV3 (arXiv 2301.04104).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from drama_jax import checks
from drama_jax.precision import widen

_BIN_LIMIT = 20.0
"""The symlog two-hot bins span [-20, 20]; symexp(20) is about 4.9e8."""


def symlog(x: jax.Array) -> jax.Array:
    """sign(x) log(1 + |x|), elementwise: compresses large magnitudes, is the identity to first order at 0."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: jax.Array) -> jax.Array:
    """sign(x) (exp(|x|) - 1), elementwise: the inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def two_hot_bins(num_bins: int, dtype: DTypeLike) -> jax.Array:
    """Bin centres [num_bins], in symlog space, from -20 to 20.

    The values are rounded to float32 whatever `dtype` is, each half counted from its own end. For an odd `num_bins`
    the centre is therefore not quite 0 (7.45e-8 for 255 bins), as in the released weights' bins.
    """
    checks.integers("two_hot_bins", 2, num_bins=num_bins)
    step = np.float64(np.float32(2 * _BIN_LIMIT / (num_bins - 1)))
    index = np.arange(num_bins, dtype=np.float64)
    from_start = -_BIN_LIMIT + step * index
    from_end = _BIN_LIMIT - step * (num_bins - 1 - index)
    bins = np.where(index < num_bins // 2, from_start, from_end).astype(np.float32)
    return jnp.asarray(bins, dtype)


def two_hot(x: jax.Array, num_bins: int) -> jax.Array:
    """Spreads symlog(x) over its two neighbouring bins.

    Args:
      x: raw values [...]; values beyond symexp(20) in magnitude are clipped to the outermost bin.
      num_bins: number of bins.

    Returns:
      Weights [..., num_bins], at most two non-zero, summing to 1.
    """
    checks.arrays("two_hot", x=(x, (...,), "float"))
    value = jnp.clip(symlog(widen(x)), -_BIN_LIMIT, _BIN_LIMIT)
    bins = two_hot_bins(num_bins, value.dtype)
    # bins[upper - 1] < value <= bins[upper]; a comparison with all bins fuses, a binary search would not.
    upper = jnp.maximum(jnp.sum(bins < value[..., None], axis=-1, dtype=jnp.int32), 1)
    spacing = 2 * _BIN_LIMIT / (num_bins - 1)
    weight = jnp.clip((value - bins[upper - 1]) / spacing, 0.0, 1.0)[..., None]
    at_upper = jax.nn.one_hot(upper, num_bins, dtype=value.dtype)
    at_lower = jax.nn.one_hot(upper - 1, num_bins, dtype=value.dtype)
    return weight * at_upper + (1 - weight) * at_lower


def two_hot_decode(logits: jax.Array) -> jax.Array:
    """Expected value under two-hot logits: symexp(softmax(logits) . bins), [..., num_bins] -> [...]."""
    checks.arrays("two_hot_decode", logits=(logits, (..., "bins"), "float"))
    probs = jax.nn.softmax(widen(logits), axis=-1)
    return symexp(jnp.sum(probs * two_hot_bins(logits.shape[-1], probs.dtype), axis=-1))


def two_hot_loss(logits: jax.Array, x: jax.Array) -> jax.Array:
    """Cross-entropy between two_hot(x) and the logits, in nats.

    Args:
      logits: [..., num_bins].
      x: raw targets [...].

    Returns:
      Loss per element [...].
    """
    checks.arrays("two_hot_loss", logits=(logits, (..., "bins"), "float"), x=(x, (...,), "float"))
    log_probs = jax.nn.log_softmax(widen(logits), axis=-1)
    target = jnp.asarray(two_hot(x, logits.shape[-1]), log_probs.dtype)
    return -jnp.sum(target * log_probs, axis=-1)


def unimix(logits: jax.Array, ratio: float) -> jax.Array:
    """Mixes a share of the uniform distribution into every categorical.

    The uniform term is ratio / K, not ratio / C, as in the released code: the same number in every preset, since
    K = C there; where K differs from C the mixture sums to 1 - ratio + ratio C / K.

    Args:
      logits: raw logits [..., K, C].
      ratio: share of the uniform distribution.

    Returns:
      Log-probabilities of the mixture [..., K, C].
    """
    checks.arrays("unimix", logits=(logits, (..., "K", "C"), "float"))
    checks.numbers("unimix", 0, 1, ratio=ratio)
    probs = jax.nn.softmax(widen(logits), axis=-1)
    return jnp.log(ratio / logits.shape[-2] + (1 - ratio) * probs)


def straight_through(log_probs: jax.Array, gumbel: jax.Array) -> jax.Array:
    """Samples one-hot vectors whose gradient is that of the class probabilities.

    The value is exactly one-hot (the probabilities enter as p - stop_gradient(p) = 0), so that nothing downstream
    sees 0.99999994 in place of 1.

    Args:
      log_probs: log-probabilities [..., K, C].
      gumbel: standard Gumbel noise [..., K, C].

    Returns:
      one_hot(argmax(log_probs + gumbel)) [..., K, C], with the gradient of softmax(log_probs).
    """
    shape = (..., "K", "C")
    checks.arrays("straight_through", log_probs=(log_probs, shape, "float"), gumbel=(gumbel, shape, "float"))
    log_probs = widen(log_probs)
    choice = jnp.argmax(log_probs + jnp.asarray(gumbel, log_probs.dtype), axis=-1)
    sample = jax.nn.one_hot(choice, log_probs.shape[-1], dtype=log_probs.dtype)
    probs = jax.nn.softmax(log_probs, axis=-1)
    return sample + (probs - jax.lax.stop_gradient(probs))


def sample_one_hot(key: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Samples one-hot vectors [..., C] from log-probabilities [..., C], without a gradient. The key is consumed."""
    checks.key("sample_one_hot", key)
    checks.arrays("sample_one_hot", log_probs=(log_probs, (..., "C"), "float"))
    log_probs = jax.lax.stop_gradient(widen(log_probs))
    choice = jax.random.categorical(key, log_probs, axis=-1)
    return jax.nn.one_hot(choice, log_probs.shape[-1], dtype=log_probs.dtype)


def categorical_kl(p_log: jax.Array, q_log: jax.Array) -> jax.Array:
    """KL(p || q) in nats, summed over the K categoricals.

    Args:
      p_log: logits of p [..., K, C]; need not be normalised.
      q_log: logits of q [..., K, C].

    Returns:
      The divergence [...].
    """
    shape = (..., "K", "C")
    checks.arrays("categorical_kl", p_log=(p_log, shape, "float"), q_log=(q_log, shape, "float"))
    p_log = jax.nn.log_softmax(widen(p_log), axis=-1)
    q_log = jax.nn.log_softmax(widen(q_log), axis=-1)
    return jnp.sum(jnp.exp(p_log) * (p_log - q_log), axis=(-2, -1))


def free_bits_kl(
    p_log: jax.Array, q_log: jax.Array, free_bits: float, weight: jax.Array | None = None, *, each: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The mean KL(p || q), not penalised below `free_bits` nats.

    The threshold applies to the mean: where that is below it, no divergence has a gradient, however large. With `each`
    it applies to every divergence before the mean, so that the large ones keep theirs.

    Args:
      p_log: logits of p [..., K, C].
      q_log: logits of q [..., K, C].
      free_bits: threshold in nats, for the sum over the K categoricals.
      weight: how much each divergence counts [...], 0 or 1; None if all count. If none does, the mean is 0.
      each: mean max(free_bits, KL) in place of max(free_bits, mean KL).

    Returns:
      (the loss [], mean KL []).
    """
    kl = categorical_kl(p_log, q_log)
    checks.arrays("free_bits_kl", weight=(weight, kl.shape, "float or None"))
    checks.numbers("free_bits_kl", 0, free_bits=free_bits)

    def mean(value: jax.Array) -> jax.Array:
        return value.mean() if weight is None else (weight * value).sum() / jnp.maximum(weight.sum(), 1)

    threshold = jnp.asarray(free_bits, kl.dtype)
    if each:
        return mean(jnp.maximum(threshold, kl)), mean(kl)
    return jnp.maximum(threshold, mean(kl)), mean(kl)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of Bernoulli logits [...] with labels [...] (bool or 0..1), per element [...], in nats."""
    checks.arrays("binary_cross_entropy", logits=(logits, (...,), "float"), labels=(labels, (...,), "any"))
    logits = widen(logits)
    return jax.nn.softplus(logits) - logits * jnp.asarray(labels, logits.dtype)


def categorical_entropy(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits), [..., A] -> [...], in nats."""
    checks.arrays("categorical_entropy", logits=(logits, (..., "A"), "float"))
    log_probs = jax.nn.log_softmax(widen(logits), axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
