"""The kernels that `gpu_mixer` launches: one program for each row of the batch. Letters as there.

Arrays are seen flat, and read and written by offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


def step_program(
    *refs: Any, width: int, epsilon: float, time: int, horizon: int, heads: int, head_dim: int, state: int
) -> None:
    """One step; `refs` are those of position, projection, taps, window, weights, and of what is written."""
    position_ref, projected_ref, *tap_refs = refs[: width + 1]
    context_ref, context_keys_ref, context_weights_ref, rollout_ref, keys_ref, weights_ref = refs[width + 1 : width + 7]
    kernel_ref, bias_ref, dt_bias_ref, A_log_ref, D_ref, scale_ref = refs[width + 7 : width + 13]
    normed_ref, new_context_weights_ref, new_rollout_ref, new_keys_ref, new_weights_ref = refs[width + 13 :]
    row = pl.program_id(0)
    inner = heads * head_dim
    channels, size = inner + 2 * state, 2 * inner + 2 * state + heads
    wide, stored = weights_ref.dtype, projected_ref.dtype
    head, entry = jnp.arange(heads), jnp.arange(state)
    channel = head[:, None] * head_dim + jnp.arange(head_dim)[None, :]  # [H, P]
    position = position_ref[0]

    def convolved(part: jax.Array) -> jax.Array:
        total = pltriton.load(bias_ref.at[part])
        for tap, ref in enumerate((*tap_refs, projected_ref)):
            x = pltriton.load(ref.at[row * size + inner + part]).astype(wide)
            total = total + pltriton.load(kernel_ref.at[tap * channels + part]) * x
        return _silu(total).astype(stored)

    x, key, query = convolved(channel), convolved(inner + entry), convolved(inner + state + entry).astype(wide)
    dt = pltriton.load(projected_ref.at[row * size + inner + channels + head]).astype(wide)
    dt = _softplus(dt + pltriton.load(dt_bias_ref.at[head]))
    decay = jnp.exp(-dt * jnp.exp(pltriton.load(A_log_ref.at[head])))

    def attended(x_ref: Any, keys_ref: Any, weights_ref: Any, out_ref: Any, steps: int, here: Any) -> jax.Array:
        step = jnp.arange(pl.next_power_of_2(steps))
        held = step < (steps if here is None else here)
        place = row * steps + step
        there = jnp.broadcast_to((step < steps)[:, None], (step.shape[0], heads))
        at = place[:, None] * heads + head[None, :]
        weights = pltriton.load(weights_ref.at[at], mask=there, other=0.0) * decay[None, :]
        mask = jnp.broadcast_to(held[:, None], (step.shape[0], state))
        keys = pltriton.load(keys_ref.at[place[:, None] * state + entry[None, :]], mask=mask, other=0.0)
        mask = jnp.broadcast_to(held[:, None, None], (step.shape[0], heads, head_dim))
        values = pltriton.load(x_ref.at[(place * inner)[:, None, None] + channel[None]], mask=mask, other=0.0)
        new = weights if here is None else jnp.where((step == here)[:, None], dt[None, :], weights)
        pltriton.store(out_ref.at[at], new, mask=there)
        attention = jnp.sum(keys.astype(wide) * query[None, :], axis=1)[:, None] * weights
        return jnp.sum(attention[:, :, None] * values.astype(wide), axis=0)

    own = pltriton.load(D_ref.at[head]) + dt * jnp.sum(key.astype(wide) * query)
    y = own[:, None] * x.astype(wide)
    y = y + attended(context_ref, context_keys_ref, context_weights_ref, new_context_weights_ref, time, None)
    y = y + attended(rollout_ref, keys_ref, weights_ref, new_weights_ref, horizon, position)
    # Row `position` was not read above, so these may write in place. A step beyond the horizon writes nothing.
    room = position < horizon
    here = row * horizon + jnp.minimum(position, horizon - 1)
    pltriton.store(new_rollout_ref.at[here * inner + channel], x, mask=jnp.broadcast_to(room, channel.shape))
    pltriton.store(new_keys_ref.at[here * state + entry], key, mask=jnp.broadcast_to(room, entry.shape))
    y = jnp.where(room, y, jnp.nan).astype(stored)
    gate = pltriton.load(projected_ref.at[row * size + channel])
    normed = _gated_norm(y, gate, pltriton.load(scale_ref.at[channel]), epsilon)
    pltriton.store(normed_ref.at[row * inner + channel], normed.astype(stored))


def context_program(
    projected_ref: Any, index_ref: Any, kernel_ref: Any, bias_ref: Any, dt_bias_ref: Any, A_log_ref: Any, D_ref: Any,
    scale_ref: Any, normed_ref: Any, context_ref: Any, keys_ref: Any, weights_ref: Any,
    *, epsilon: float, time: int, heads: int, head_dim: int, state: int, width: int,
) -> None:  # fmt: skip
    """All steps of the context, one after the other, with the steps before in registers."""
    row = pl.program_id(0)
    inner = heads * head_dim
    channels, size = inner + 2 * state, 2 * inner + 2 * state + heads
    wide, stored = weights_ref.dtype, projected_ref.dtype
    head, entry = jnp.arange(heads), jnp.arange(state)
    channel = head[:, None] * head_dim + jnp.arange(head_dim)[None, :]  # [H, P]
    parts = (channel, inner + entry, inner + state + entry)  # x, B, C
    taps = [[pltriton.load(kernel_ref.at[tap * channels + part]) for tap in range(width)] for part in parts]
    biases = [pltriton.load(bias_ref.at[part]) for part in parts]
    dt_bias, A = pltriton.load(dt_bias_ref.at[head]), -jnp.exp(pltriton.load(A_log_ref.at[head]))
    D, scale = pltriton.load(D_ref.at[head]), pltriton.load(scale_ref.at[channel])
    segments = [index_ref[row * time + t] for t in range(time)]
    inputs: list[list[jax.Array]] = []  # per step: x, B, C before the convolution
    xs: list[jax.Array] = []
    keys: list[jax.Array] = []
    weights: list[jax.Array] = []
    for t in range(time):
        start = (row * time + t) * size
        inputs.append([pltriton.load(projected_ref.at[start + inner + part]) for part in parts])
        same = [_same(segments[s], segments[t], wide) for s in range(t)]
        x, key, query = (
            _silu(_stencil(kernel, [step[which].astype(wide) for step in inputs], same) + bias).astype(stored)
            for which, (kernel, bias) in enumerate(zip(taps, biases))
        )
        query = query.astype(wide)
        dt = _softplus(pltriton.load(projected_ref.at[start + inner + channels + head]).astype(wide) + dt_bias)
        decay = jnp.exp(dt * A)
        for s in range(t):
            weights[s] = weights[s] * (decay * same[s])
        xs.append(x)
        keys.append(key)
        weights.append(dt)
        y = D[:, None] * x.astype(wide)
        for s in range(t + 1):
            attention = weights[s] * jnp.sum(keys[s].astype(wide) * query)
            y = y + attention[:, None] * xs[s].astype(wide)
        gate = pltriton.load(projected_ref.at[start + channel])
        at = (row * time + t) * inner + channel
        pltriton.store(normed_ref.at[at], _gated_norm(y.astype(stored), gate, scale, epsilon).astype(stored))
        pltriton.store(context_ref.at[at], x)
        pltriton.store(keys_ref.at[(row * time + t) * state + entry], key)
    for t in range(time):
        pltriton.store(weights_ref.at[(row * time + t) * heads + head], weights[t])


def _stencil(kernel: Sequence[jax.Array], steps: Sequence[jax.Array], same: Sequence[jax.Array]) -> jax.Array:
    """The causal convolution at the last of `steps`; `same` is 0 for an earlier step of another segment."""
    width, t = len(kernel), len(steps) - 1
    total = kernel[-1] * steps[t]
    for tap in range(width - 1):
        s = t - (width - 1) + tap
        if s >= 0:
            total = total + kernel[tap] * (steps[s] * same[s])
    return total


def _gated_norm(y: jax.Array, gate: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm(y SiLU(gate)) over all heads, in the dtype of `scale`."""
    gated = y.astype(scale.dtype) * _silu(gate.astype(scale.dtype))
    return gated * (scale * jax.lax.rsqrt(jnp.sum(gated * gated) / gated.size + epsilon))


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _same(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """1 if the two whole numbers are equal, else 0."""
    return (1 - jnp.minimum(jnp.abs(a - b), 1)).astype(dtype)
