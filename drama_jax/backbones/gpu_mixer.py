"""The middle of a Mamba-2 mixer during a rollout, between in_proj and out_proj, as one GPU kernel.

Causal convolution, window attention (see `mamba2_window`), gate and inner norm: one program per row of the batch, so
that the norm, too, stays inside. Every past input is read once, with all reads of a row in flight at once; nothing but
the new row of the window, the weights and the normed result is written. XLA makes six kernels of it.
`mixer_context` is the same over the context before the rollout.

Shapes: B batch, T context steps, L horizon, H heads, P head dim, I = H P, N state dim, W conv width,
J = 2 I + 2 N + H the projection [z | x | B | C | dt]. H, P and N are powers of two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_WARPS = 4


@flax.struct.dataclass
class GpuLayerWindow:
    """What one mixer remembers during a rollout, as the kernel wants it."""

    taps: tuple[jax.Array, ...]  # W - 1 times [B, J] compute dtype: the last projections, oldest first
    context: jax.Array  # [B, T, I] compute dtype: x of the context
    context_keys: jax.Array  # [B, T, N] compute dtype: B of the context
    context_weights: jax.Array  # [B, T, H] float32: w_s of the context
    rollout: jax.Array  # [B, L, I] compute dtype: x of the rollout, written in place
    keys: jax.Array  # [B, L, N] compute dtype: B of the rollout, written in place
    weights: jax.Array  # [B, L, H] float32: w_s of the rollout
    position: jax.Array  # [1] int32: steps of the rollout so far


@flax.struct.dataclass
class MixerWeights:
    """The mixer's parameters that enter between the projections, float32."""

    kernel: jax.Array  # [W, I + 2 N]
    bias: jax.Array  # [I + 2 N]
    dt_bias: jax.Array  # [H]
    A_log: jax.Array  # [H]
    D: jax.Array  # [H]
    scale: jax.Array  # [I], of the inner norm

    @classmethod
    def of(cls, mixer: dict[str, Any]) -> MixerWeights:
        """From the parameters of a `Mamba2Mixer`."""
        conv, norm = mixer["conv"], mixer["norm"]
        rest = (mixer["dt_bias"], mixer["A_log"], mixer["D"], norm["scale"])
        return cls(conv["kernel"], conv["bias"], *rest)

    def flat(self) -> tuple[jax.Array, ...]:
        """In the order of the kernels' arguments."""
        return (self.kernel.reshape(-1), self.bias, self.dt_bias, self.A_log, self.D, self.scale)


def mixer_step(
    projected: jax.Array, window: GpuLayerWindow, weights: MixerWeights, *, epsilon: float, interpret: bool = False
) -> tuple[jax.Array, GpuLayerWindow]:
    """One step of a rollout.

    Args:
      projected: [B, J], the result of in_proj.
      window: of the steps before.
      weights: of the mixer.
      epsilon: of the inner norm.
      interpret: run without a GPU, slowly.

    Returns:
      The normed values [B, I] for out_proj in the dtype of `projected`, NaN beyond the horizon, and the window.
    """
    batch, time, inner = window.context.shape
    horizon, state = window.keys.shape[1:]
    heads = weights.D.shape[0]
    past = (window.context, window.context_keys, window.context_weights, window.rollout, window.keys, window.weights)
    operands = (window.position, projected, *window.taps, *past)
    outs = (jax.ShapeDtypeStruct((batch, inner), projected.dtype), *past[2:])
    first = 2 + len(window.taps)
    normed, context_weights, rollout, keys, new_weights = pl.pallas_call(
        functools.partial(
            _step_program, width=len(window.taps) + 1, epsilon=epsilon, time=time, horizon=horizon, heads=heads,
            head_dim=inner // heads, state=state,
        ),
        grid=(batch,),
        out_shape=[jax.ShapeDtypeStruct((out.size,), out.dtype) for out in outs],
        input_output_aliases={first + 3: 2, first + 4: 3},
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=f"mixer_step_{inner}",
    )(*(operand.reshape(-1) for operand in operands), *weights.flat())  # fmt: skip
    return normed.reshape(batch, inner), dataclasses.replace(
        window,
        taps=(*window.taps[1:], projected),
        context_weights=context_weights.reshape(window.context_weights.shape),
        rollout=rollout.reshape(window.rollout.shape),
        keys=keys.reshape(window.keys.shape),
        weights=new_weights.reshape(window.weights.shape),
        position=window.position + 1,
    )


def mixer_context(
    projected: jax.Array,
    index: jax.Array,
    weights: MixerWeights,
    *,
    horizon: int,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, GpuLayerWindow]:
    """Over a context that starts from nothing.

    Args:
      projected: [B, T, J], the result of in_proj.
      index: [B, T] int32 segment index; the past of another segment is dropped.
      weights: of the mixer.
      horizon: L, how many steps may follow.
      epsilon: of the inner norm.
      interpret: run without a GPU, slowly.

    Returns:
      The normed values [B, T, I] for out_proj in the dtype of `projected`, and the window for `mixer_step`.
    """
    batch, time, _ = projected.shape
    heads, inner = weights.D.shape[0], weights.scale.shape[0]
    state = (weights.bias.shape[0] - inner) // 2
    width, dtype, wide = weights.kernel.shape[0], projected.dtype, weights.D.dtype
    outs = [(inner, dtype), (inner, dtype), (state, dtype), (heads, wide)]
    normed, context, keys, context_weights = pl.pallas_call(
        functools.partial(
            _context_program, epsilon=epsilon, time=time, heads=heads, head_dim=inner // heads, state=state, width=width
        ),
        grid=(batch,),
        out_shape=[jax.ShapeDtypeStruct((batch * time * numbers,), dtype) for numbers, dtype in outs],
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=f"mixer_context_{inner}",
    )(projected.reshape(-1), index.reshape(-1), *weights.flat())
    return normed.reshape(batch, time, inner), GpuLayerWindow(
        taps=_last_taps(projected, index, width),
        context=context.reshape(batch, time, inner),
        context_keys=keys.reshape(batch, time, state),
        context_weights=context_weights.reshape(batch, time, heads),
        rollout=jnp.zeros((batch, horizon, inner), dtype),
        keys=jnp.zeros((batch, horizon, state), dtype),
        weights=jnp.zeros((batch, horizon, heads), wide),
        position=jnp.zeros((1,), jnp.int32),
    )


def _last_taps(projected: jax.Array, index: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """The last W - 1 steps, zero where another segment or nothing is."""
    time = index.shape[1]
    missing = max(0, width - 1 - time)
    first = time + missing - (width - 1)
    last = jnp.pad(projected, ((0, 0), (missing, 0), (0, 0)))[:, first:]
    owner = jnp.pad(index, ((0, 0), (missing, 0)), constant_values=-1)[:, first:]
    last = jnp.where((owner == index[:, -1:])[..., None], last, 0)
    return tuple(last[:, tap] for tap in range(width - 1))


def _step_program(
    *refs: Any, width: int, epsilon: float, time: int, horizon: int, heads: int, head_dim: int, state: int
) -> None:
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


def _context_program(
    projected_ref: Any, index_ref: Any, kernel_ref: Any, bias_ref: Any, dt_bias_ref: Any, A_log_ref: Any, D_ref: Any,
    scale_ref: Any, normed_ref: Any, context_ref: Any, keys_ref: Any, weights_ref: Any,
    *, epsilon: float, time: int, heads: int, head_dim: int, state: int, width: int,
) -> None:  # fmt: skip
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
