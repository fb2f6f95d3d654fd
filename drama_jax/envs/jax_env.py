"""Environments written in JAX (the gymnax interface), seen and acted in as the agent does: pure functions, auto-reset.

What the agent sees and does follows from the environment's spaces:

* A board `[rows, columns(, C)]` is shown as an image. It is enlarged by whole factors, one per axis, and centred on a
  black image, so that a cell stays a sharp rectangle.
* A vector `[O]` is shown as it is, in float32; one of N numbers (`Discrete(N)`), one-hot.
* One of A actions (`Discrete(A)`) is played as it is.
* Of A numbers between bounds (`Box`), the agent's -1 is the lower bound, its 1 the upper, linearly in between, for each
  number on its own.

H, W, C are frame height, width and channels, O the numbers of a vector.
"""

from __future__ import annotations

import difflib
import importlib
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.config import ConfigError


@flax.struct.dataclass
class JaxEnvState:
    """Where an environment stands, with what the agent sees of it."""

    inner: Any  # the wrapped environment's state
    frame: jax.Array  # [H, W, C] uint8, or [O] float32, the current observation
    first: jax.Array  # [] bool, `frame` is the first of an episode


@flax.struct.dataclass
class Outcome:
    """What an action brought."""

    reward: jax.Array  # [] float32
    terminal: jax.Array  # [] bool, the action ended the episode; never a truncation
    last: jax.Array  # [] bool, the episode ended here, over or truncated


class JaxEnv:
    """A gymnax (1.x) environment.

    Hashed by identity: pass it as a static argument.

    Attributes:
      num_actions: A, or `action_space.Continuous(A)`.
      frame_shape: of a frame: (H, W, C), or (O,).

    Args:
      env: an environment with gymnax's `reset`, `step` and `observation_space`, and `action_space` or (then its actions
        are discrete) `num_actions`.
      params: its parameters.
      image_size: height and width of the frames in pixels; not looked at if observations are vectors.

    Raises:
      ConfigError: if the observations are neither boards nor vectors, or larger than the image, or if the actions are
        neither discrete nor numbers between finite bounds.
    """

    def __init__(self, env: Any, params: Any, image_size: int) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ConfigError(f"image_size must be a positive integer, got {image_size!r}")
        self._env, self._params = env, params
        shape = observation_shape(env, params)
        space = env.observation_space(params)
        self._classes = int(space.n) if hasattr(space, "n") else None
        self.frame_shape: tuple[int, ...] = shape
        if len(shape) == 3:
            if max(shape[:2]) > image_size:
                raise ConfigError(
                    f"image_size must be at least {max(shape[:2])} for observations {tuple(space.shape)}, "
                    f"got {image_size}"
                )
            self._low, self._high = float(np.min(space.low)), float(np.max(space.high))
            self._factors = [image_size // n for n in shape[:2]]
            rest = [image_size - n * factor for n, factor in zip(shape[:2], self._factors)]
            self._padding = [(r // 2, r - r // 2) for r in rest] + [(0, 0)]
            self.frame_shape = (image_size, image_size, shape[2])
        self.num_actions, self._bounds = _actions(env, params)

    def reset(self, key: jax.Array) -> JaxEnvState:
        """Starts an episode. The key is consumed."""
        with _their_promotion():
            board, inner = self._env.reset(key, self._params)
        return JaxEnvState(inner=inner, frame=self.to_frame(board), first=jnp.ones((), bool))

    def step(self, state: JaxEnvState, action: jax.Array, key: jax.Array) -> tuple[JaxEnvState, Outcome]:
        """Plays an action ([] int32, or [A] float32 in -1..1); the key is consumed.

        Where the episode ends, the returned state is the first of the next one already. The reward of the last action
        is that action's outcome, so that a transition (frame, action, reward, terminal) holds what belongs together;
        the frame after the last action is never seen.
        """
        if self._bounds is not None:
            low, high = self._bounds
            action = low + (jnp.clip(action.reshape(low.shape), -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        with _their_promotion():
            board, inner, reward, terminated, truncated, _ = self._env.step(key, state.inner, action, self._params)
        # Two endings at once count as the episode's own, not as the time limit's.
        last = jnp.logical_or(terminated, truncated)
        outcome = Outcome(reward=jnp.asarray(reward, jnp.float32), terminal=jnp.asarray(terminated, bool), last=last)
        return JaxEnvState(inner=inner, frame=self.to_frame(board), first=last), outcome

    def to_frame(self, observation: jax.Array) -> jax.Array:
        """What the agent sees of an observation: [H, W, C] uint8, a board's range mapped to 0..255, or [O] float32."""
        if self._classes is not None:
            return jax.nn.one_hot(observation, self._classes, dtype=jnp.float32)
        if len(self.frame_shape) == 1:
            return jnp.asarray(observation, jnp.float32)
        scaled = (jnp.asarray(observation, jnp.float32) - self._low) / (self._high - self._low)
        pixels = jnp.round(255 * jnp.clip(scaled, 0, 1)).astype(jnp.uint8).reshape(*observation.shape[:2], -1)
        for axis, factor in enumerate(self._factors):
            pixels = jnp.repeat(pixels, factor, axis=axis)
        return jnp.pad(pixels, self._padding)


def _actions(env: Any, params: Any) -> tuple[ActionSpace, tuple[np.ndarray, np.ndarray] | None]:
    """The agent's actions, and bounds [A] or [] float32 of the environment's if they are continuous."""
    space = env.action_space(params) if hasattr(env, "action_space") else None
    if space is None or hasattr(space, "n"):
        return int(env.num_actions if space is None else space.n), None
    shape = getattr(space, "shape", None)
    if shape is None or len(shape) > 1 or not hasattr(space, "low"):
        raise ConfigError(f"actions must be one of several, or numbers between bounds, got {space!r}")
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), shape) for bound in (space.low, space.high))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all() and math.prod(shape)):
        raise ConfigError(f"actions must lie between finite bounds, got {low.tolist()} and {high.tolist()}")
    return Continuous(math.prod(shape)), (low, high)


def _their_promotion() -> Any:
    # gymnax multiplies bools by floats; our own code must also run under strict promotion.
    return jax.numpy_dtype_promotion("standard")


def make(name: str, image_size: int) -> JaxEnv:
    """The environment that `load` finds; images have `image_size` pixels in height and width.

    Raises:
      ConfigError: if gymnax is missing, there is no such environment, or it is none that `JaxEnv` takes.
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


def observation_shape(env: Any, params: Any) -> tuple[int, ...]:
    """Of an environment's observations: (rows, columns, channels) of a board, or (O,) of a vector.

    Raises:
      ConfigError: if they are neither, or a board's numbers are not bounded.
    """
    space = env.observation_space(params)
    if hasattr(space, "n"):
        return (int(space.n),)
    shape = tuple(getattr(space, "shape", ()))
    if len(shape) not in (1, 2, 3) or not math.prod(shape):
        raise ConfigError(f"observations must be [rows, columns], [rows, columns, C] or a vector, got shape {shape}")
    if len(shape) == 1:
        return shape
    low, high = float(np.min(space.low)), float(np.max(space.high))
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ConfigError(f"observations must lie between two finite numbers, got {low} and {high}")
    return (*shape, 1)[:3]
