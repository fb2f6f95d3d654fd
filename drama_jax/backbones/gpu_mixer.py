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
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from drama_jax.backbones.gpu_mixer_programs import context_program, step_program

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


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
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
            step_program, width=len(window.taps) + 1, epsilon=epsilon, time=time, horizon=horizon, heads=heads,
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


@functools.partial(jax.jit, static_argnames=("horizon", "epsilon", "interpret"))
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
            context_program,
            epsilon=epsilon,
            time=time,
            heads=heads,
            head_dim=inner // heads,
            state=state,
            width=width,
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
