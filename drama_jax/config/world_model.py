"""The world model and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from drama_jax.config.autoencoder import AutoencoderConfig
from drama_jax.config.backbone import BackboneConfig
from drama_jax.config.learning import ComputeDtype, OptimizerConfig
from drama_jax.config.validation import check_types, not_negative, positive, require


@dataclass(frozen=True)
class WorldModelConfig:
    """World model: autoencoder, backbone, heads, loss and its optimiser."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    head_units: int = 256
    """Width of the one hidden layer in the reward and termination heads."""
    num_bins: int = 255
    """Bins of the symlog two-hot distributions."""
    batch_size: int = 16
    batch_length: int = 128
    """T, the steps of one training sequence."""
    free_bits: float = 1.0
    """Nats below which the KL, summed over the categoricals, is not penalised."""
    free_bits_each: bool = True
    """Compare each step's KL with `free_bits`. The released code (`reference`) compares their mean: once most steps are
    easy to predict it is lower, and no step has a gradient, however wrong."""
    dynamics_scale: float = 1.0
    representation_scale: float = 0.1
    compute_dtype: ComputeDtype = "auto"
    """Precision of convolutions and matrix products; `auto` is bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "head_units", "batch_size", "dynamics_scale")
        require(self.num_bins >= 3, f"WorldModelConfig.num_bins must be at least 3, got {self.num_bins}")
        require(self.batch_length >= 2, f"WorldModelConfig.batch_length must be at least 2, got {self.batch_length}")
        not_negative(self, "free_bits", "representation_scale")
        self.check_length("WorldModelConfig.batch_length", self.batch_length)

    def check_length(self, name: str, steps: int) -> None:
        """Raises a ConfigError if the backbone cannot take sequences of `steps` steps, as the field `name` wants."""
        most = self.backbone.max_length
        require(
            self.backbone.name != "transformer" or steps <= most,
            f"{name} must be at most backbone.max_length = {most} for a transformer, got {steps}",
        )

    @property
    def feature_size(self) -> int:
        """F = S + D, the width of the behaviour's input."""
        return self.autoencoder.latent_size + self.backbone.width
