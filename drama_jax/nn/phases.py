"""Pixels to phases and back: the two layouts of `nn.convolution`, which says what they are for."""

from __future__ import annotations

import jax

from drama_jax.checks import arrays as check_arrays


def space_to_depth(x: jax.Array) -> jax.Array:
    """Pixels to phases: [N, 2h, 2w, C] -> [N, h, w, 4C], any dtype."""
    check_arrays("space_to_depth", x=(x, ("N", "2h", "2w", "C"), "any"))
    n, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"space_to_depth: x must have even height and width, got {x.shape}")
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, 4 * channels)


def depth_to_space(x: jax.Array) -> jax.Array:
    """Phases to pixels, the inverse of `space_to_depth`: [N, h, w, 4C] -> [N, 2h, 2w, C]."""
    check_arrays("depth_to_space", x=(x, ("N", "h", "w", "4C"), "any"))
    n, height, width, channels = x.shape
    if channels % 4:
        raise ValueError(f"depth_to_space: x must have a multiple of four channels, got {x.shape}")
    x = x.reshape(n, height, width, 2, 2, channels // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, channels // 4)
