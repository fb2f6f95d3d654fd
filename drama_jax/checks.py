"""Checks of arguments at the public entrances: one clear line in place of an error from deep inside a traced function.

Only shapes, dtypes and Python values are looked at, while a function is traced: compiled code holds nothing of it.
Under `jax.vmap` the shapes are those of one example.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple["int | str | types.EllipsisType", ...]
"""Sizes, or letters for sizes that must agree between the arguments; `...` in front stands for any leading axes."""

_KINDS = {"integer": jnp.integer, "float": jnp.floating}


def arrays(function: str, sizes: Mapping[str, int] | None = None, /, **arguments: tuple[Any, Shape, str]) -> None:
    """Every argument is an array of its shape and type.

    Args:
      function: what was called, for the message.
      sizes: letters whose size is known.
      **arguments: name -> (value, shape, type). The type is a dtype, "integer", "float" or "any", and may end in
        " or None". A letter is bound by the first argument that has it.

    Raises:
      TypeError: an argument is no array.
      ValueError: an argument has another shape or type.
    """
    known: dict[str, Any] = dict(sizes or {})
    for name, (value, shape, kind) in arguments.items():
        kind, _, optional = kind.partition(" or ")
        if value is None and optional:
            continue
        wanted = f"{'an array' if kind == 'any' else kind} {_letters(shape)}{' or None' if optional else ''}"
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise TypeError(f"{function}: {name} must be {wanted}, got {_show(value)}")
        if not _is_kind(value.dtype, kind) or not _fits(value.shape, shape, known):
            here = _letters(tuple(_size(entry, known) for entry in shape))
            here = "" if here == _letters(shape) else f", here {here}"
            given = f"{value.dtype} {_letters(value.shape)}"
            raise ValueError(f"{function}: {name} must be {wanted}{here}, got {given}")


def integers(function: str, at_least: int = 1, at_most: int = 2**31 - 1, /, **values: Any) -> None:
    """Every value is a Python (or numpy) integer in a range; traced values cannot be sizes.

    Raises:
      TypeError: a value is no integer.
      ValueError: it is out of range.
    """
    for name, value in values.items():
        wanted = f"{function}: {name} must be an integer from {at_least} to {at_most}"
        try:
            number = None if isinstance(value, bool) else value.__index__()
        except (AttributeError, TypeError):  # a tracer has the method, and refuses
            number = None
        if number is None:
            raise TypeError(f"{wanted}, got {_show(value)}")
        if not at_least <= number <= at_most:
            raise ValueError(f"{wanted}, got {number}")


def numbers(function: str, low: float, high: float = float("inf"), /, **values: Any) -> None:
    """Every value is a number with low <= value <= high, or a real scalar array, whose value is not looked at.

    Raises:
      TypeError: a value is no number.
      ValueError: it is out of range.
    """
    for name, value in values.items():
        limits = f"in [{low:g}, {high:g}]"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not low <= value <= high:
                raise ValueError(f"{function}: {name} must be a number {limits}, got {value}")
        elif getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.number):
            raise TypeError(f"{function}: {name} must be a number {limits} or a scalar array, got {_show(value)}")


def instances(function: str, /, **arguments: tuple[Any, type | tuple[type, ...]]) -> None:
    """Every argument (value, type) is of that type.

    Raises:
      TypeError: one is not.
    """
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            wanted = " or ".join(
                "None" if one is type(None) else one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))
            )
            raise TypeError(f"{function}: {name} must be of type {wanted}, got {_show(value)}")


def parts(function: str, name: str, tree: Any, *wanted: str) -> None:
    """A tree of parameters or statistics is a dict that has these entries.

    Raises:
      TypeError: it is no dict.
      ValueError: it lacks one.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{function}: {name} must be a dict with {', '.join(wanted)}, got {_show(tree)}")
    missing = [part for part in wanted if part not in tree]
    if missing:
        there = ", ".join(map(str, tree)) or "nothing"
        raise ValueError(
            f"{function}: {name} must have {', '.join(wanted)}; {', '.join(missing)} is missing from {there}"
        )


def key(function: str, value: Any, name: str = "key") -> None:
    """The argument called `name` is one PRNG key, typed or of the old kind.

    Raises:
      TypeError: it is something else, or several keys.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == jnp.uint32 and shape in ((2,), (4,))):
        raise TypeError(f"{function}: {name} must be one PRNG key, as from jax.random.key(0), got {_show(value)}")


def _is_kind(dtype: Any, kind: str) -> bool:
    if kind == "any":
        return True
    return bool(jnp.issubdtype(dtype, _KINDS[kind])) if kind in _KINDS else bool(dtype == kind)


def _fits(given: tuple[Any, ...], wanted: tuple[Any, ...], known: dict[str, Any]) -> bool:
    """Whether the shape fits; if so, its letters are known from here on."""
    if wanted[:1] == (...,):
        axes = len(given) - len(wanted) + 1
        if axes < 0:
            return False
        given, wanted = (given[:axes], *given[axes:]), ("...", *wanted[1:])
    if len(given) != len(wanted):
        return False
    found = dict(known)
    for entry, size in zip(wanted, given):
        if (found.setdefault(entry, size) if isinstance(entry, str) else entry) != size:
            return False
    known.update(found)
    return True


def _size(entry: Any, known: Mapping[str, Any]) -> Any:
    return known.get("..." if entry is ... else entry, entry)


def _letters(shape: Any) -> str:
    flat: list[Any] = []
    for entry in shape:
        flat.extend(entry if isinstance(entry, tuple) else [entry])
    return f"[{', '.join('...' if entry is ... else str(entry) for entry in flat)}]"


def _show(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype} {_letters(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return " ".join(repr(value).split())[:80]
    return f"a {value.__name__} itself" if isinstance(value, type) else f"a {type(value).__name__}"
