"""Imagined rollouts, and the actor and critic that learn from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drama_jax.config.learning import ComputeDtype, OptimizerConfig
from drama_jax.config.validation import MOST_LAYERS, at_most, check_types, fraction, not_negative, positive, require

BehaviourName = Literal["actor_critic", "ppo"]


@dataclass(frozen=True)
class ImaginationConfig:
    """Rollouts inside the world model."""

    batch_size: int = 1024
    """Number of start points per update."""
    context_length: int = 8
    """Real steps that precede each imagined rollout."""
    horizon: int = 16
    unroll: int = 16
    """Imagined steps per iteration of the compiled loop; unrolled is faster on a GPU and slower to compile."""
    draw_terminations: bool = False
    """An imagined episode ends with the probability that is predicted. The released code ends it where that is above
    one half, which leaves out every end that the model is not sure of."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "batch_size", "context_length", "horizon", "unroll")


@dataclass(frozen=True)
class BehaviourConfig:
    """Actor and critic trained on imagined rollouts."""

    name: BehaviourName = "actor_critic"
    """How: one policy-gradient step on each batch of rollouts, or several clipped ones (`ppo`)."""
    actor_layers: int = 3
    actor_units: int = 256
    critic_layers: int = 3
    critic_units: int = 512
    num_bins: int = 255
    discount: float = 0.985
    lambda_: float = 0.95
    entropy_scale: float = 3e-4
    slow_critic_decay: float = 0.98
    return_scale_decay: float = 0.99
    return_percentiles: tuple[float, float] = (0.05, 0.95)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(max_grad_norm=100.0))
    compute_dtype: ComputeDtype = "auto"
    epochs: int = 3
    """Of `ppo`: passes over the rollouts per update."""
    minibatch_size: int = 16_384
    """Of `ppo`: imagined steps per gradient step."""
    clip_ratio: float = 0.2
    """Of `ppo`: how far the policy's probabilities may move from those sampled from, as a ratio, and still gain."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "actor_layers", "actor_units", "critic_layers", "critic_units")
        positive(self, "epochs", "minibatch_size", "clip_ratio")
        at_most(self, MOST_LAYERS, "actor_layers", "critic_layers", "epochs")
        fraction(self, "discount", "lambda_", "slow_critic_decay", "return_scale_decay")
        require(self.num_bins >= 3, f"BehaviourConfig.num_bins must be at least 3, got {self.num_bins}")
        not_negative(self, "entropy_scale")
        low, high = self.return_percentiles
        require(
            0 < low < high < 1,
            f"BehaviourConfig.return_percentiles must satisfy 0 < low < high < 1, got {self.return_percentiles}",
        )
