"""What is remembered, and what of it is learnt from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drama_jax.config.validation import check_types, not_negative, positive

Sampler = Literal["dfs", "uniform"]


@dataclass(frozen=True)
class ReplayConfig:
    """Replay ring and its sampler."""

    capacity: int = 100_000
    """Steps the ring holds."""
    sampler: Sampler = "dfs"
    tau: float = 10.0
    """Temperature of world-model sampling."""
    imagination_tau: float = 10.0
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "capacity", "tau", "imagination_tau")
        not_negative(self, "alpha", "beta")
