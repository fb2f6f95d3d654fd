"""The linear recurrence that all scans over states come to."""

from __future__ import annotations

import jax

Link = tuple[jax.Array, jax.Array]
"""A decay and what is added: s -> decay s + added."""


def compose(first: Link, second: Link) -> Link:
    """Both links as one; associative, for `jax.lax.associative_scan`."""
    return first[0] * second[0], first[1] * second[0] + second[1]
