"""The protocol of vectorised environments that live outside JAX.

E is the number of parallel environments; H, W, C are frame height, width and channels, O the numbers of a vector, A
those of a continuous action.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.config import ConfigError


class StateMismatch(RuntimeError):  # noqa: N818 - it says what was found
    """An emulator could not be brought back to a saved state."""


class EmulatorError(RuntimeError):
    """An emulator failed while it played."""


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


class Observation(NamedTuple):
    """One row per environment: what `reset` or `step` brought. The arrays are the caller's; no later step changes them.

    `rewards`, `terminals`, `last` and `truncated` belong to the action just played, `frames` is what it led to. A row
    with `first` set begins an episode: its frame follows no counted action, its reward is 0 and its flags are unset.
    """

    frames: np.ndarray  # [E, H, W, C] uint8, or [E, O] float32
    rewards: np.ndarray  # [E] float32, raw score gained
    terminals: np.ndarray  # [E] bool, the episode is over or (if so configured) a life was lost; never a truncation
    last: np.ndarray  # [E] bool, the episode ended here, over or truncated
    truncated: np.ndarray  # [E] bool, the episode was cut off at its step limit
    first: np.ndarray  # [E] bool, this frame is the first of an episode
    lives: np.ndarray  # [E] int32, lives left; 0 throughout in games without lives


class Env(Protocol):
    """E environments stepped together.

    After a row with `last` set, the next `step` ignores that environment's action and returns its reset row (`first`
    set). That row is no agent step: it is not counted, and no transition with the ignored action is stored.
    """

    num_envs: int

    @property
    def num_actions(self) -> ActionSpace:
        """A, or `Continuous(A)`."""
        ...

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image, (O,) of a vector."""
        ...

    def reset(self) -> Observation:
        """Starts a new episode everywhere; every row has `first` set."""
        ...

    def step(self, actions: np.ndarray) -> Observation:
        """Plays `actions` ([E] integers in [0, num_actions), or [E, A] floats in -1..1 if they are continuous).

        Raises:
          ValueError: wrong shape or type, or an action out of range; nothing was played.
        """
        ...

    def get_state(self) -> bytes:
        """Everything that later steps depend on, and the last observation; without pickled objects.

        Raises:
          RuntimeError: before the first `reset`.
        """
        ...

    def set_state(self, state: bytes, *, on_step: Callable[[int, int], None] = no_progress) -> Observation:
        """Returns to the state `get_state` gave, in this or in another process.

        Args:
          state: What an environment of the same game and settings gave.
          on_step: Called with (steps done, steps in all) where getting there takes a while.

        Returns:
          The observation that the state was saved after.

        Raises:
          ConfigError: the state belongs to another game, or to other settings.
          StateMismatch: the state is damaged, the emulator is another version, or it did not get where it was; call
            `reset` before `step`.
        """
        ...

    def close(self) -> None:
        """Frees the emulators; the environment cannot be used afterwards."""
        ...


def check_actions(actions: np.ndarray, num_envs: int, num_actions: ActionSpace) -> np.ndarray:
    """`actions` as [E] int32 or [E, A] float32, or ValueError: emulators read out of bounds, or abort, without it."""
    continuous = isinstance(num_actions, Continuous)
    shape = (num_envs, num_actions.size) if isinstance(num_actions, Continuous) else (num_envs,)
    kind = "floats" if continuous else "integers"
    try:
        array = np.asarray(actions)
    except ValueError:  # ragged
        raise ValueError(f"actions must be {num_envs} {kind}, got {actions!r}") from None
    if array.shape != shape or not np.issubdtype(array.dtype, np.floating if continuous else np.integer):
        raise ValueError(f"actions must be {num_envs} {kind} of shape {shape}, got {array.dtype} {array.shape}")
    if isinstance(num_actions, Continuous):
        if not (np.abs(array) <= 1).all():  # nor NaN
            raise ValueError(f"actions must lie in [-1, 1], got {array.tolist()}")
        return array.astype(np.float32)
    if array.min() < 0 or array.max() >= num_actions:
        raise ValueError(f"actions must lie in [0, {num_actions}), got {array.tolist()}")
    return array.astype(np.int32)


def pack_state(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """What `get_state` returns: SHA-256, then an .npz file of the arrays and the header as JSON."""
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    content = file.getvalue()
    return hashlib.sha256(content).digest() + content


def unpack_state(state: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays that `pack_state` was given.

    Nothing of a damaged state gets any further: emulators take a few changed bytes, and corrupt the memory.

    Raises:
      TypeError: `state` is no bytes.
      StateMismatch: it is damaged, or nothing that `pack_state` returned.
    """
    if not isinstance(state, bytes):
        raise TypeError(f"the saved environment must be bytes, as from get_state, got a {type(state).__name__}")
    digest, content = state[:32], state[32:]
    if hashlib.sha256(content).digest() != digest:
        raise StateMismatch(
            f"its {len(state)} bytes are damaged, or no state of an environment (their SHA-256 differs)"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return dict(json.loads(arrays.pop("header").tobytes())), arrays
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StateMismatch(f"it is no state of an environment ({type(error).__name__})") from error


def attempt(call: Callable[..., Observation], *arguments: Any, **options: Any) -> Observation:
    """What a method of an environment returns; what emulators raise where they fail becomes an `EmulatorError`."""
    try:
        return call(*arguments, **options)
    except (ConfigError, StateMismatch):
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise EmulatorError(f"{type(error).__name__}: {error}") from error
