"""Dynamic frequency-based sampling (DFS): which windows of the replay to train on and to imagine from.

Two counters per start index record how often a window beginning there trained the world model and how often it
began an imagined rollout. World-model sampling favours starts trained rarely; imagination favours starts that the
world model has seen at least as often as they were imagined from. Source: Drama, arXiv 2410.08893, section 2.3.

Draws are without replacement by Gumbel top-k: the k largest of `logits + Gumbel noise` are distributed as k
successive draws from softmax(logits) with the drawn entries removed. Logits therefore need no normalisation, and
uniform sampling is the same draw with zero logits.

N is the number of entries (the replay's capacity).
"""

from __future__ import annotations

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import checks

_SMALLEST = 1e-30
"""Temperatures and ratios must be positive."""
_COMPARED = 4096
"""Most values that are compared each with each."""


@flax.struct.dataclass
class Counters:
    """How often each start index was drawn."""

    trained: jax.Array  # [N] int32, draws for world-model training
    imagined: jax.Array  # [N] int32, draws for imagination


def init(capacity: int) -> Counters:
    """Counters at zero for `capacity` entries."""
    checks.integers("dfs.init", capacity=capacity)
    return Counters(trained=jnp.zeros(capacity, jnp.int32), imagined=jnp.zeros(capacity, jnp.int32))


def training_logits(trained: jax.Array, tau: float | jax.Array) -> jax.Array:
    """Unnormalised log-probabilities of world-model sampling, `-trained / tau`.

    Args:
      trained: [..., N] int32, training draws per start.
      tau: Temperature, positive; may be traced. Large values approach uniform sampling.

    Returns:
      [..., N] logits in tau's dtype (the default float for a Python number).
    """
    checks.arrays("dfs.training_logits", trained=(trained, (..., "N"), "integer"))
    checks.numbers("dfs.training_logits", _SMALLEST, tau=tau)
    return -trained.astype(_float_dtype(tau)) / tau


def imagination_logits(
    trained: jax.Array,
    imagined: jax.Array,
    ratio: float,
    tau: float | jax.Array,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> jax.Array:
    """Unnormalised log-probabilities of imagination sampling.

    With m = imagined / ratio the logits are `(trained - alpha m - beta max(0, trained - m)) / tau`. For
    alpha = beta = 1 that is `min(trained - m, 0) / tau`: uniform over starts trained at least as often as imagined.

    Args:
      trained: [..., N] int32, training draws per start.
      imagined: [..., N] int32, imagination draws per start.
      ratio: Starts of an imagination batch per start of a training batch; puts both counters on one scale.
      tau: Temperature, positive; may be traced.
      alpha: Weight of the imagination count.
      beta: Weight of the surplus of training over imagination.

    Returns:
      [..., N] logits in tau's dtype (the default float for a Python number).
    """
    function = "dfs.imagination_logits"
    checks.arrays(function, trained=(trained, (..., "N"), "integer"), imagined=(imagined, (..., "N"), "integer"))
    checks.numbers(function, _SMALLEST, tau=tau, ratio=ratio)
    checks.numbers(function, 0, alpha=alpha, beta=beta)
    dtype = _float_dtype(tau)
    count = trained.astype(dtype)
    scaled = imagined.astype(dtype) / ratio
    return (count - alpha * scaled - beta * jnp.maximum(count - scaled, 0)) / tau


@jax.named_scope("sampler")
def sample(key: jax.Array, logits: jax.Array, size: int | jax.Array, num: int) -> jax.Array:
    """Draws `num` distinct indices among the first `size` entries.

    Args:
      key: PRNG key, consumed.
      logits: [N] unnormalised log-probabilities; finite.
      size: Number of valid entries; may be traced. At least `num`, or entries beyond `size` fill the draw.
      num: Number of draws, at most N.

    Returns:
      [num] int32 indices below `size`, in the order drawn.
    """
    checks.arrays("dfs.sample", logits=(logits, ("N",), "float"))
    return sample_masked(key, logits, jnp.arange(logits.shape[0]) < size, num)


def sample_masked(key: jax.Array, logits: jax.Array, valid: jax.Array, num: int) -> jax.Array:
    """As `sample`, among the entries where `valid` ([N] bool) holds; at least `num` of them must."""
    checks.key("dfs.sample", key)
    checks.arrays("dfs.sample", logits=(logits, ("N",), "float"), valid=(valid, ("N",), "bool"))
    checks.integers("dfs.sample", 1, logits.shape[0], num=num)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return largest(jnp.where(valid, logits + noise, -jnp.inf), num)


def largest(values: jax.Array, num: int) -> jax.Array:
    """Indices of the `num` largest of `values`, largest first and the first of equals first, as `lax.top_k` has them.

    Args:
      values: [N] numbers, none of them NaN.
      num: How many, 1..N.

    Returns:
      [num] int32.
    """
    checks.arrays("dfs.largest", values=(values, ("N",), "float"))
    checks.integers("dfs.largest", 1, values.shape[0], num=num)
    sort, compare = (functools.partial(way, num=num) for way in (_largest_by_top_k, largest_by_comparison))
    found: jax.Array = jax.lax.platform_dependent(values, cpu=sort, default=compare)
    return found


def _largest_by_top_k(values: jax.Array, num: int) -> jax.Array:
    return jax.lax.top_k(values, num)[1]


def largest_by_comparison(values: jax.Array, num: int) -> jax.Array:
    """`largest` as accelerators find it.

    XLA's `top_k` sorts all values on a GPU, in ten launches outside CUDA graphs (0.6 ms of waiting, H100), or for up to
    16 numbers runs in one block, which takes 55 us for a thousand values (H200). In rows of R values, the `num`
    largest lie in the `num` rows whose maxima are the largest: N / R maxima and num R values are left, and of each of
    them the `num` largest are found likewise, until they are so few that each is compared with all others at once.

    Args:
      values: as for `largest`, and `num` and what is returned likewise.
    """
    size = values.shape[0]
    if size <= _COMPARED:
        return _in_order(values, jnp.arange(size, dtype=jnp.int32), num)
    width = 1 << round(math.log2(math.sqrt(size / num)))
    if width < 4 or num > _COMPARED:
        return _largest_by_top_k(values, num)
    rows = -(-size // width)
    table = jnp.pad(values, (0, rows * width - size), constant_values=-jnp.inf).reshape(rows, width)
    best = largest_by_comparison(table.max(axis=1), num)
    best = _in_order(-best, best, num)  # in the order of the table, so that of equals the first remains the first
    index = best[:, None] * width + jnp.arange(width, dtype=jnp.int32)
    return index.reshape(-1)[largest_by_comparison(table[best].reshape(-1), num)]


def _in_order(values: jax.Array, index: jax.Array, num: int) -> jax.Array:
    """The `index` [n] int32 of the `num` largest of `values` [n], of equals the smaller first, by n^2 comparisons."""
    ahead = (values > values[:, None]) | ((values == values[:, None]) & (index < index[:, None]))
    rank = jnp.sum(ahead, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank == jnp.arange(num, dtype=jnp.int32)[:, None], index, 0), axis=1, dtype=jnp.int32)


def increment(counter: jax.Array, indices: jax.Array) -> jax.Array:
    """Adds one to `counter` ([N] int32) at `indices` ([M] int32)."""
    checks.arrays("dfs.increment", counter=(counter, ("N",), "integer"), indices=(indices, ("M",), "integer"))
    return counter.at[indices].add(1)


def _float_dtype(tau: float | jax.Array) -> jnp.dtype:
    return jnp.result_type(tau) if isinstance(tau, jax.Array) else jnp.result_type(float)
