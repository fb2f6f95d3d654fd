"""The policy's distribution over actions: categorical over A actions, or a tanh-Gaussian over A numbers in -1..1.

The tanh-Gaussian is u ~ N(mean, deviation^2), a = tanh(u), for each entry of an action on its own, so that

    log p(a) = sum_i log N(u_i; mean_i, deviation_i^2) - log(1 - a_i^2),    u = artanh(a)

(Haarnoja et al. 2018, arXiv 1801.01290, appendix C). Actions closer to +-1 than `MARGIN` count as lying there, where
float32 still tells them apart. The actor's 2 A outputs are squashed so that neither mean nor deviation can run away:
mean = 5 tanh(x / 5), which keeps u where tanh still has a slope, and deviation in 0.1..1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax import checks, distributions

MARGIN = 1e-6
"""How close to +-1 an action gets."""
_LARGEST_MEAN = 5.0
_DEVIATIONS = (0.1, 1.0)
_DEVIATION_SHIFT = 2.0  # outputs of 0, as at the start, mean a deviation near the largest: sigmoid(2) = 0.88
_NODES = 32
"""Of the quadrature: enough for the entropy to be right to 1e-6 nats at any mean and deviation."""


def log_probs(outputs: jax.Array, actions: jax.Array, *, continuous: bool) -> jax.Array:
    """Log-probabilities, or densities, of actions.

    Args:
      outputs: of the actor, [..., A] logits, or [..., 2 A] if continuous.
      actions: [...] int, or [..., A] float in -1..1 if continuous.
      continuous: which.

    Returns:
      [...] in the dtype of `outputs`.
    """
    if continuous:
        return tanh_gaussian_log_prob(*gaussian(outputs), actions)
    chosen = jax.nn.one_hot(actions, outputs.shape[-1], dtype=outputs.dtype)
    return jnp.sum(jax.nn.log_softmax(outputs) * chosen, axis=-1)


def entropy(outputs: jax.Array, *, continuous: bool) -> jax.Array:
    """Entropy of the distribution over actions, [..., A] or [..., 2 A] -> [...], in nats.

    That of a continuous action is differential, and of the action itself, not of the Gaussian before the tanh. It is at
    most ln 2 per entry, that of uniform actions.
    """
    return tanh_gaussian_entropy(*gaussian(outputs)) if continuous else distributions.categorical_entropy(outputs)


def sample(key: jax.Array, outputs: jax.Array, *, continuous: bool) -> jax.Array:
    """Actions [...] int32 or [..., A] float32, without a gradient. The key is consumed."""
    if not continuous:
        return jax.random.categorical(key, outputs)
    mean, deviation = gaussian(jax.lax.stop_gradient(outputs))
    return _squash(mean + deviation * jax.random.normal(key, mean.shape, mean.dtype))


def greedy(outputs: jax.Array, *, continuous: bool) -> jax.Array:
    """The most likely action [...] int32, or the tanh of the Gaussian's mean (the median) [..., A] float32."""
    return _squash(gaussian(outputs)[0]) if continuous else jnp.argmax(outputs, axis=-1).astype(jnp.int32)


def _squash(u: jax.Array) -> jax.Array:
    return jnp.clip(jnp.tanh(u).astype(jnp.float32), -1 + MARGIN, 1 - MARGIN)


def gaussian(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation before the tanh, [..., A] each, from the actor's outputs [..., 2 A]."""
    mean, deviation = jnp.split(outputs, 2, axis=-1)
    low, high = _DEVIATIONS
    deviation = low + (high - low) * jax.nn.sigmoid(deviation + _DEVIATION_SHIFT)
    return _LARGEST_MEAN * jnp.tanh(mean / _LARGEST_MEAN), deviation


def tanh_gaussian_log_prob(mean: jax.Array, deviation: jax.Array, actions: jax.Array) -> jax.Array:
    """Log-density [...] of actions in -1..1 under a tanh-Gaussian, all three [..., A]."""
    shape = (..., "A")
    checks.arrays(
        "tanh_gaussian_log_prob",
        mean=(mean, shape, "float"), deviation=(deviation, shape, "float"), actions=(actions, shape, "float"),
    )  # fmt: skip
    actions = jnp.clip(actions.astype(mean.dtype), -1 + MARGIN, 1 - MARGIN)
    distance = (jnp.arctanh(actions) - mean) / deviation
    normal = -0.5 * jnp.square(distance) - jnp.log(deviation) - 0.5 * math.log(2 * math.pi)
    return jnp.sum(normal - jnp.log1p(-actions) - jnp.log1p(actions), axis=-1)


def tanh_gaussian_entropy(mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """Differential entropy [...] of a tanh-Gaussian, from mean and deviation [..., A], in nats.

    The Gaussian's entropy plus E[log(1 - tanh(u)^2)]; the expectation by Gauss-Hermite quadrature. Unlike a sample's
    -log p(a), whose gradient at a fixed action is zero on average, it pulls the policy towards entropy.
    """
    shape = (..., "A")
    checks.arrays("tanh_gaussian_entropy", mean=(mean, shape, "float"), deviation=(deviation, shape, "float"))
    points, weights = np.polynomial.hermite.hermgauss(_NODES)
    nodes = jnp.asarray(math.sqrt(2) * points, mean.dtype)
    share = jnp.asarray(weights / math.sqrt(math.pi), mean.dtype)
    u = mean[..., None] + deviation[..., None] * nodes
    # log(1 - tanh(u)^2), which as written is log 0 from |u| = 9 on.
    slope = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    normal = 0.5 * math.log(2 * math.pi * math.e) + jnp.log(deviation)
    return jnp.sum(normal + jnp.sum(share * slope, axis=-1), axis=-1)
