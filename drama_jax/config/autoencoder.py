"""Observations and their discrete latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drama_jax.config.validation import (
    LARGEST,
    MOST_LAYERS,
    at_most,
    check_types,
    fraction,
    not_negative,
    positive,
    require,
)

Reconstruction = Literal["squared_error", "cross_entropy"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """The discrete variational autoencoder: frame <-> K categoricals of C classes.

    A frame is an image, or, where `vector_size` is not 0, a vector.
    """

    image_size: int = 64
    """Height and width of a frame in pixels."""
    image_channels: int = 3
    depths: tuple[int, ...] = (16, 32, 48, 64, 64)
    """Channels of each 5x5 convolution; the first has stride 1, every other one stride 2."""
    categoricals: int = 32
    classes: int = 32
    unimix: float = 0.01
    """Share of the uniform distribution mixed into every categorical."""
    reconstruction: Reconstruction = "squared_error"
    """Loss of an image's pixels; the released code has the first. `cross_entropy`, of each pixel as a probability, is
    for boards whose cells are on or off: where one is seldom on the sigmoid is near 0, and by the squared error hardly
    moves from there."""
    vector_size: int = 0
    """Numbers of a vector observation, which is then seen in place of an image; 0 for images."""
    vector_layers: int = 3
    """Hidden layers of a vector's encoder, and of its decoder."""
    vector_units: int = 256

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "image_size", "image_channels", "categoricals", "classes", "vector_layers", "vector_units")
        at_most(self, MOST_LAYERS, "vector_layers")
        not_negative(self, "vector_size")
        fraction(self, "unimix")
        require(
            self.reconstruction == "squared_error" or not self.vector_size,
            "AutoencoderConfig.reconstruction must be squared_error for vector observations, got cross_entropy",
        )
        require(len(self.depths) >= 2, f"AutoencoderConfig.depths needs at least two entries, got {self.depths}")
        require(min(self.depths) > 0, f"AutoencoderConfig.depths must be positive, got {self.depths}")
        size = self.latent_size
        require(size <= LARGEST, f"AutoencoderConfig.categoricals * classes must be <= {LARGEST}, got {size}")
        require(len(self.depths) <= 16, f"AutoencoderConfig.depths needs at most 16 entries, got {len(self.depths)}")
        factor = 2 ** (len(self.depths) - 1)
        require(
            self.image_size % factor == 0,
            f"AutoencoderConfig.image_size must be a multiple of {factor} for {len(self.depths)} depths, "
            f"got {self.image_size}",
        )

    @property
    def latent_size(self) -> int:
        """S = K * C, the width of the flattened latent."""
        return self.categoricals * self.classes

    @property
    def map_size(self) -> int:
        """Height and width of the encoder's last feature map."""
        return int(self.image_size // 2 ** (len(self.depths) - 1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a frame."""
        return (self.image_size, self.image_size, self.image_channels)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of an observation: (height, width, channels) of an image, or (entries,) of a vector."""
        return (self.vector_size,) if self.vector_size else self.image_shape

    @property
    def frame_dtype(self) -> Literal["uint8", "float32"]:
        """Type of an observation: uint8 of an image, float32 of a vector."""
        return "float32" if self.vector_size else "uint8"

    @property
    def embedding_size(self) -> int:
        """E, the features that the encoder makes of an observation."""
        return self.vector_units if self.vector_size else self.map_size**2 * self.depths[-1]
