"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467): flax's, set up for every precision we run in."""

from __future__ import annotations

from flax import linen as nn
from jax.typing import DTypeLike


def rms_norm(epsilon: float, dtype: DTypeLike, name: str | None = None) -> nn.RMSNorm:
    """A module that normalises the last axis in `dtype`; its input must be of `dtype` already, at least float32."""
    # flax's own promotion to float32 refuses float64 under strict dtype promotion.
    return nn.RMSNorm(epsilon, dtype=dtype, param_dtype=dtype, force_float32_reductions=False, name=name)
