"""What the world model and the behaviour both have: an optimiser and a precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drama_jax.config.validation import check_types, fraction, not_negative, positive, require

ComputeDtype = Literal["auto", "float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class OptimizerConfig:
    """LaProp with linear warm-up and global-norm clipping (paper, appendix on hyper-parameters)."""

    learning_rate: float = 4e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-20
    weight_decay: float = 0.0
    """Decoupled decay per update, not multiplied by the learning rate."""
    warmup_updates: int = 1000
    max_grad_norm: float = 1000.0

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "learning_rate", "eps", "max_grad_norm")
        fraction(self, "weight_decay")
        require(0 <= self.b1 < 1, f"OptimizerConfig.b1 must lie in [0, 1), got {self.b1}")
        require(0 < self.b2 < 1, f"OptimizerConfig.b2 must lie in (0, 1), got {self.b2}")
        not_negative(self, "warmup_updates")
