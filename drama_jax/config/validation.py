"""What every part of the configuration is checked with; each failure is a `ConfigError`."""

from __future__ import annotations

import typing
from typing import Any, Literal

LARGEST = 2**31 - 1
"""Steps, slots and seeds are int32."""
MOST_LAYERS = 100
"""Each is compiled on its own."""


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line naming the field, what was given and what is accepted."""


def require(condition: bool, message: str) -> None:
    """Raises a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_types(config: Any) -> None:
    """Every field is of the type it is declared with, and every number finite; the first check of a `__post_init__`."""
    for name, wanted in typing.get_type_hints(type(config)).items():
        problem = _type_problem(wanted, getattr(config, name))
        if problem:
            given = " ".join(repr(getattr(config, name)).split())
            raise ConfigError(f"{type(config).__name__}.{name} must be {problem}, got {given[:100]}")


def _type_problem(wanted: Any, value: object) -> str | None:
    """What a value should have been, as the rest of a sentence; None if it is that."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        # In this order: what is no string may not be hashable or comparable.
        return None if isinstance(value, str) and value in arguments else f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        numbers = "integers" if arguments[0] is int else "finite numbers"
        if not isinstance(value, tuple) or any(_type_problem(arguments[0], entry) for entry in value):
            return f"a tuple of {numbers}"
        return None if arguments[1] is ... or len(value) == len(arguments) else f"a tuple of {len(arguments)} {numbers}"
    if wanted is bool:
        return None if isinstance(value, bool) else "True or False"
    if wanted is int:
        fine = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
        return None if fine else f"an integer of at most {LARGEST}"
    if wanted is float:
        # Finite in float32 as well; false for NaN.
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 3e38
        return None if fine else "a finite number"
    return None if isinstance(value, wanted) else f"of type {wanted.__name__}"


def positive(config: object, *names: str) -> None:
    """These fields are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} must be positive, got {value}")


def not_negative(config: object, *names: str) -> None:
    """These fields are 0 or above."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{type(config).__name__}.{name} must be >= 0, got {value}")


def at_most(config: object, most: int, *names: str) -> None:
    """These fields are no larger than `most`."""
    for name in names:
        value = getattr(config, name)
        require(value <= most, f"{type(config).__name__}.{name} must be at most {most}, got {value}")


def fraction(config: object, *names: str) -> None:
    """These fields lie in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{type(config).__name__}.{name} must lie in [0, 1], got {value}")
