"""The sequence model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drama_jax.config.validation import LARGEST, MOST_LAYERS, at_most, check_types, not_negative, positive, require

BackboneName = Literal["mamba2", "mamba", "gru", "transformer", "rwkv"]


@dataclass(frozen=True)
class BackboneConfig:
    """The sequence model (z_t, a_t) -> d_t."""

    name: BackboneName = "mamba2"
    """Each backbone reads the fields that name it, and `width` and `num_layers`."""
    width: int = 512
    """D, the width of the residual stream and of the output d_t."""
    num_layers: int = 2
    expand: int = 2
    """Inner width of a block of `mamba2` or `mamba` is expand * width."""
    head_dim: int = 64
    """P, the width of one head of `mamba2`, `transformer` or `rwkv`."""
    state_dim: int = 16
    """N, the state dimension of `mamba2` and `mamba`."""
    conv_width: int = 4
    """Steps that the convolution of `mamba2` and `mamba` sees."""
    chunk_size: int = 64
    """Q, the steps that the scan of `mamba2`, `mamba` or `rwkv` takes at once."""
    mixer_width: int = 0
    """Width of keys and values (`transformer`, `rwkv`) or of the hidden state (`gru`); 0 stands for width."""
    feedforward_width: int = 0
    """Hidden width of the feed-forward part (`transformer`, `rwkv`); 0 stands for expand * width."""
    max_length: int = 128
    """Steps of one segment that `transformer` has positions for."""
    dropout: float = 0.0
    """Of `transformer`, in world-model updates only: share of what attention and feed-forward part add that is dropped.
    The released code has 0.1."""
    attention_dropout: float = 0.0
    """Of `transformer`, likewise: share of the attention weights. The released code has 0.1, whatever its settings."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "width", "num_layers", "expand", "head_dim", "state_dim", "conv_width", "chunk_size")
        positive(self, "max_length")
        at_most(self, MOST_LAYERS, "num_layers", "conv_width")
        not_negative(self, "mixer_width", "feedforward_width")
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            require(0 <= rate < 1, f"BackboneConfig.{name} must lie in [0, 1), got {rate}")
        require(
            self.inner_width <= LARGEST, f"BackboneConfig.width * expand must be <= {LARGEST}, got {self.inner_width}"
        )
        if self.name == "mamba2":
            divided, size = "expand * width", self.inner_width
        elif self.name in ("transformer", "rwkv"):
            divided, size = "mixer_width" if self.mixer_width else "width", self.mixer_size
        else:
            return
        require(
            size % self.head_dim == 0,
            f"BackboneConfig.head_dim must divide {divided} = {size}, got {self.head_dim}",
        )

    @property
    def inner_width(self) -> int:
        """Width of x and z inside a block: expand * D."""
        return self.expand * self.width

    @property
    def mixer_size(self) -> int:
        """Width of keys, values or hidden state, see `mixer_width`."""
        return self.mixer_width or self.width

    @property
    def feedforward_size(self) -> int:
        """Hidden width of the feed-forward part, see `feedforward_width`."""
        return self.feedforward_width or self.inner_width

    @property
    def has_dropout(self) -> bool:
        """Whether its training takes a key for dropout."""
        return self.name == "transformer" and max(self.dropout, self.attention_dropout) > 0

    @property
    def num_heads(self) -> int:
        """H, the number of heads: of the SSD, or of `transformer` and `rwkv`."""
        return (self.inner_width if self.name == "mamba2" else self.mixer_size) // self.head_dim
