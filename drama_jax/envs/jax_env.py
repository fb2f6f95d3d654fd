"""Environments written in JAX (the gymnax interface) as image environments: pure functions with auto-reset.

Their boards are small: a frame is the board enlarged by whole factors, one per axis, and centred on a black image, so
that a cell stays a sharp rectangle. H, W, C are frame height, width and channels.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.config import ConfigError


@flax.struct.dataclass
class JaxEnvState:
    """Where an environment stands, with what the agent sees of it."""

    inner: Any  # the wrapped environment's state
    frame: jax.Array  # [H, W, C] uint8, the current observation
    first: jax.Array  # [] bool, `frame` is the first of an episode


@flax.struct.dataclass
class Outcome:
    """What an action brought."""

    reward: jax.Array  # [] float32
    terminal: jax.Array  # [] bool, the action ended the episode; never a truncation
    last: jax.Array  # [] bool, the episode ended here, over or truncated


class JaxEnv:
    """A gymnax (1.x) environment with uint8 image observations.

    Hashed by identity: pass it as a static argument.

    Args:
      env: an environment with gymnax's `reset`, `step`, `num_actions` and `observation_space`, whose observations are
        boards `[rows, columns]` or `[rows, columns, C]`.
      params: its parameters.
      image_size: height and width of the frames in pixels.

    Raises:
      ConfigError: if the observations are no boards, or larger than the image.
    """

    def __init__(self, env: Any, params: Any, image_size: int) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ConfigError(f"image_size must be a positive integer, got {image_size!r}")
        space = env.observation_space(params)
        shape = board_shape(env, params)
        if max(shape[:2]) > image_size:
            raise ConfigError(
                f"image_size must be at least {max(shape[:2])} for observations {tuple(space.shape)}, got {image_size}"
            )
        self._env, self._params = env, params
        self._low, self._high = float(np.min(space.low)), float(np.max(space.high))
        self._factors = [image_size // n for n in shape[:2]]
        rest = [image_size - n * factor for n, factor in zip(shape[:2], self._factors)]
        self._padding = [(r // 2, r - r // 2) for r in rest] + [(0, 0)]
        self.num_actions = int(env.num_actions)
        self.image_shape = (image_size, image_size, shape[2])

    def reset(self, key: jax.Array) -> JaxEnvState:
        """Starts an episode. The key is consumed."""
        with _their_promotion():
            board, inner = self._env.reset(key, self._params)
        return JaxEnvState(inner=inner, frame=self.to_frame(board), first=jnp.ones((), bool))

    def step(self, state: JaxEnvState, action: jax.Array, key: jax.Array) -> tuple[JaxEnvState, Outcome]:
        """Plays an action ([] int32); the key is consumed.

        Where the episode ends, the returned state is the first of the next one already. The reward of the last action
        is that action's outcome, so that a transition (frame, action, reward, terminal) holds what belongs together;
        the frame after the last action is never seen.
        """
        with _their_promotion():
            board, inner, reward, terminated, truncated, _ = self._env.step(key, state.inner, action, self._params)
        # Two endings at once count as the episode's own, not as the time limit's.
        last = jnp.logical_or(terminated, truncated)
        outcome = Outcome(reward=jnp.asarray(reward, jnp.float32), terminal=jnp.asarray(terminated, bool), last=last)
        return JaxEnvState(inner=inner, frame=self.to_frame(board), first=last), outcome

    def to_frame(self, board: jax.Array) -> jax.Array:
        """The board as [H, W, C] uint8, its range mapped to 0..255."""
        scaled = (jnp.asarray(board, jnp.float32) - self._low) / (self._high - self._low)
        pixels = jnp.round(255 * jnp.clip(scaled, 0, 1)).astype(jnp.uint8).reshape(*board.shape[:2], -1)
        for axis, factor in enumerate(self._factors):
            pixels = jnp.repeat(pixels, factor, axis=axis)
        return jnp.pad(pixels, self._padding)


def _their_promotion() -> Any:
    # gymnax multiplies bools by floats; our own code must also run under strict promotion.
    return jax.numpy_dtype_promotion("standard")


def make(name: str, image_size: int) -> JaxEnv:
    """The environment that `load` finds, with frames of `image_size` pixels in height and width.

    Raises:
      ConfigError: if gymnax is missing, there is no such environment, or the environment shows no image.
    """
    return JaxEnv(*load(name), image_size)


def load(name: str) -> tuple[Any, Any]:
    """An environment with gymnax's interface, and its parameters.

    Args:
      name: gymnax's name for it ("Catch-bsuite", "Breakout-MinAtar"), or MODULE:CLASS for one of your own, which is
        made without arguments and has `default_params`.

    Raises:
      ConfigError: if gymnax is missing, or there is no such environment.
    """
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            env = getattr(importlib.import_module(module), attribute)()
            return env, env.default_params
        except (ImportError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"no environment {name!r}: {error}") from error
    try:
        import gymnax
    except ImportError as error:
        raise ConfigError(
            f"JAX environments need gymnax: run python -m pip install -e '.[gymnax]' ({error})"
        ) from error
    try:
        env, params = gymnax.make(name)
    except (ValueError, TypeError) as error:
        close = difflib.get_close_matches(str(name), gymnax.registered_envs, n=3, cutoff=0.4)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"gymnax has no environment {name!r}{meant}") from error
    return env, params


def board_shape(env: Any, params: Any) -> tuple[int, int, int]:
    """(rows, columns, channels) of an environment's observations.

    Raises:
      ConfigError: if they are no boards of bounded numbers.
    """
    space = env.observation_space(params)
    shape = tuple(getattr(space, "shape", ()))
    if len(shape) not in (2, 3):
        raise ConfigError(f"observations must be [rows, columns] or [rows, columns, C], got shape {shape}")
    low, high = float(np.min(space.low)), float(np.max(space.high))
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ConfigError(f"observations must lie between two finite numbers, got {low} and {high}")
    return (*shape, 1)[:3]
