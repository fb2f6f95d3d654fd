"""What an agent may do: one of A actions, or A numbers in -1..1.

Wherever `num_actions` is asked for, an `int` A stands for discrete actions (int32, [...]) and `Continuous(A)` for
continuous ones (float32, [..., A]).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from drama_jax import checks
from drama_jax.config import ConfigError


@dataclass(frozen=True)
class Continuous:
    """Actions of `size` numbers in -1..1.

    Raises:
      ConfigError: the size is no positive integer.
    """

    size: int
    """A, the numbers of one action."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size < 2**31:
            raise ConfigError(f"Continuous.size must be at least 1, an integer, got {self.size!r}")


ActionSpace = int | Continuous
"""Static: part of the `jax.jit` cache key."""


def check(function: str, num_actions: ActionSpace) -> None:
    """`num_actions` is `Continuous`, or a positive integer.

    Raises:
      TypeError, ValueError: it is not.
    """
    if not isinstance(num_actions, Continuous):
        checks.integers(function, num_actions=num_actions)


def size(num_actions: ActionSpace) -> int:
    """A: the number of discrete actions, or of the numbers of a continuous one."""
    return num_actions.size if isinstance(num_actions, Continuous) else num_actions


def spec(num_actions: ActionSpace, axes: tuple[str, ...]) -> tuple[checks.Shape, str]:
    """Shape and type, for `checks.arrays`, of actions with these leading axes."""
    return ((*axes, num_actions.size), "float") if isinstance(num_actions, Continuous) else (axes, "integer")


def zeros(num_actions: ActionSpace, lead: tuple[int, ...]) -> jax.Array:
    """Actions [*lead] int32 or [*lead, A] float32, of zeros."""
    if isinstance(num_actions, Continuous):
        return jnp.zeros((*lead, num_actions.size), jnp.float32)
    return jnp.zeros(lead, jnp.int32)


def uniform(key: jax.Array, num_actions: ActionSpace, lead: tuple[int, ...] = ()) -> jax.Array:
    """Uniformly random actions [*lead] int32 or [*lead, A] float32. The key is consumed."""
    check("action_space.uniform", num_actions)
    checks.key("action_space.uniform", key)
    if isinstance(num_actions, Continuous):
        return jax.random.uniform(key, (*lead, num_actions.size), jnp.float32, -1.0, 1.0)
    return jax.random.randint(key, lead, 0, num_actions)
