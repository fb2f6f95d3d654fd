"""EnvPool beyond Atari: DeepMind control, Procgen, Gym's MuJoCo and Box2D tasks, classic control.

What the agent sees and does follows from the task's spaces:

* A picture (uint8, three channels) is shown as one, area-averaged to the agent's size where that is another.
* Numbers, or several named arrays of them, are shown as one float32 vector, in the order of the space; one of N
  numbers, one-hot.
* One of A actions is played as it is. Of A numbers between bounds, the agent's -1 is the lower bound, its 1 the upper.

An episode that the step limit ends is truncated, no terminal. EnvPool tells no more than that: where a task ends by
itself on the very last step allowed, that counts as the limit's. DeepMind control's tasks never end by themselves.
The first row of an episode has reward 0, where EnvPool repeats the last one of the episode before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.config import ConfigError, TaskConfig
from drama_jax.envs.base import Observation
from drama_jax.envs.envpool_backend import Pool, import_envpool
from drama_jax.envs.resize import AreaResize

_INT32_MAX = 2**31 - 1
_MOST_ACTIONS = 255
_CLASSES = 256
"""Most numbers that are shown one-hot."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task of EnvPool is like."""

    name: str
    shape: tuple[int, ...]
    """Of an observation: (height, width, 3) of a picture, (O,) of a vector."""
    num_actions: ActionSpace
    max_episode_steps: int
    """Agent steps after which it cuts an episode off, if nothing else is wanted."""
    limit_is_fixed: bool
    """Procgen keeps to its own limit whatever it is told."""
    observation_space: Any
    """Gymnasium's."""
    action_space: Any
    """Gymnasium's."""


def describe(name: str) -> Task:
    """What a task is like, without starting it.

    Args:
      name: as in `envpool.list_all_envs()`, for example "CheetahRun-v1" or "CoinrunEasy-v0".

    Raises:
      ConfigError: no such task, one of Atari, one that misses a library of the system, or one whose observations or
        actions are of another kind than the agent's.
    """
    pool = import_envpool()
    if not isinstance(name, str) or name not in pool.list_all_envs():
        close = difflib.get_close_matches(str(name), pool.list_all_envs(), n=3, cutoff=0.5)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"EnvPool {pool.__version__} has no task {name!r}{meant}")
    with _as_config_error(name):
        spec = pool.make_spec(name)
        seen, done = spec.gymnasium_observation_space, spec.gymnasium_action_space
    options = spec.config._fields
    if "full_action_space" in options:
        raise ConfigError(f"{name} is Atari: python -m experiments.atari100k --game {name.partition('-')[0]}")
    limit = int(getattr(spec.config, "max_episode_steps", 0))
    if limit < 1:
        raise ConfigError(f"{name} has no limit of steps; tasks without one are not supported")
    fixed = "distribution_mode" in options
    return Task(name, _shape(name, seen), _num_actions(name, done), limit, fixed, seen, done)


def make_task(
    name: str, config: TaskConfig, *, num_envs: int, image_size: int, seed: int, num_threads: int = 0
) -> EnvPoolTask:
    """Starts `num_envs` copies of a task.

    Args:
      name: see `describe`.
      config: Its rules.
      num_envs: E, at least 1.
      image_size: Height and width of a frame in pixels; not looked at if observations are vectors.
      seed: Environment i gets seed + i.
      num_threads: Emulator threads; 0 is one per core, at most `num_envs`.

    Raises:
      ConfigError: see `describe`; or a number is out of range.
    """
    if not isinstance(config, TaskConfig):
        raise ConfigError(f"config must be a TaskConfig, got a {type(config).__name__}")
    for label, value, low, high in (
        ("num_envs", num_envs, 1, 4096),
        ("image_size", image_size, 1, 1024),
        ("num_threads", num_threads, 0, 4096),
        ("seed", seed, 0, _INT32_MAX - 4096),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{label} must be an integer from {low} to {high}, got {value!r}")
    task = describe(name)
    limit = config.max_episode_steps or task.max_episode_steps
    if task.limit_is_fixed and limit != task.max_episode_steps:
        raise ConfigError(
            f"TaskConfig.max_episode_steps must be 0 or {task.max_episode_steps} for {name}, which keeps to its own "
            f"limit, got {limit}"
        )
    return EnvPoolTask(task, limit, num_envs=num_envs, image_size=image_size, seed=seed, num_threads=num_threads)


class EnvPoolTask(Pool):
    """E copies of one task. See `make_task` for the arguments."""

    def __init__(self, task: Task, limit: int, *, num_envs: int, image_size: int, seed: int, num_threads: int) -> None:
        picture = len(task.shape) == 3
        shape = (image_size, image_size, 3) if picture else task.shape
        self._resize = AreaResize(task.shape[0], task.shape[1], image_size) if picture and shape != task.shape else None
        identity = {
            "task": task.name,
            "num_envs": num_envs,
            "image_shape": list(shape),
            "max_episode_steps": limit,
            "seed": seed,
        }
        options = {
            "task_id": task.name,
            "env_type": "gymnasium",
            "num_envs": num_envs,
            "batch_size": num_envs,
            "num_threads": num_threads,
            "seed": seed,
            "max_episode_steps": limit,
        }
        super().__init__(options, identity, task.num_actions, shape)
        self._space, space = task.observation_space, task.action_space
        self._type, self._form = space.dtype, (num_envs, *space.shape)
        if isinstance(task.num_actions, Continuous):
            self._low, self._high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))
        else:
            self._type = np.dtype(np.int32)  # the space says int64, which EnvPool casts

    def _start(self) -> None:
        with _as_config_error(self._options["task_id"]):
            super()._start()
            _ = self._pool.observation_space  # made, with warnings about it, when it is first asked for

    def _theirs(self, actions: np.ndarray) -> np.ndarray:
        if isinstance(self.num_actions, Continuous):
            share = (actions.astype(np.float64) + 1) / 2
            actions = self._low + share * (self._high - self._low)
        return actions.reshape(self._form).astype(self._type)

    def _observation(
        self, frames: Any, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> Observation:
        first = np.asarray(info["elapsed_step"] == 0)
        return Observation(
            frames=self._picture(frames) if len(self.frame_shape) == 3 else self._vector(frames),
            rewards=np.where(first, 0, rewards).astype(np.float32),
            terminals=terminated & ~truncated & ~first,
            last=(terminated | truncated) & ~first,
            truncated=truncated & ~first,
            first=first,
            lives=np.zeros(self.num_envs, np.int32),
        )

    def _picture(self, frames: np.ndarray) -> np.ndarray:
        """[E, H, W, 3] uint8."""
        frames = frames.transpose(0, 2, 3, 1) if frames.shape[-1] != 3 else frames
        if self._resize is not None:
            return np.stack([self._resize(frame) for frame in frames])
        return np.ascontiguousarray(frames)

    def _vector(self, observed: Any) -> np.ndarray:
        """[E, O] float32.

        Raises:
          RuntimeError: the physics diverged.
        """
        space = self._space
        if hasattr(space, "n"):
            return np.eye(int(space.n), dtype=np.float32)[np.asarray(observed)]
        parts = [observed[key] for key in space.spaces] if isinstance(observed, dict) else [observed]
        vector = np.concatenate([np.asarray(part).reshape(self.num_envs, -1) for part in parts], axis=1)
        with np.errstate(over="ignore"):
            vector = vector.astype(np.float32)
        if not np.isfinite(vector).all():
            raise RuntimeError("an observation is not finite")
        return vector


@contextlib.contextmanager
def _as_config_error(name: str) -> Iterator[None]:
    """What EnvPool raises where it cannot make a task, in one line; Procgen names the packages that it misses."""
    try:
        with warnings.catch_warnings():
            # Of gymnasium, that bounds lose digits in float32.
            warnings.simplefilter("ignore", UserWarning)
            yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} cannot be started: {' '.join(str(error).split())[:300]}") from error


def _shape(name: str, space: Any) -> tuple[int, ...]:
    """Of the agent's observation."""
    shape = getattr(space, "shape", None)
    if shape is not None and len(shape) == 3 and space.dtype == np.uint8 and 3 in (shape[0], shape[-1]):
        return tuple(shape) if shape[-1] == 3 else (*shape[1:], 3)
    if getattr(space, "start", None) == 0 and space.n <= _CLASSES:
        return (int(space.n),)
    parts = list(space.spaces.values()) if hasattr(space, "spaces") else [space]
    if not all(hasattr(part, "low") and np.issubdtype(part.dtype, np.floating) for part in parts):
        raise ConfigError(f"{name} shows neither a colour picture nor numbers, but {_one_line(space)}")
    return (sum(math.prod(part.shape) for part in parts),)


def _num_actions(name: str, space: Any) -> ActionSpace:
    if getattr(space, "start", None) == 0:
        if space.n > _MOST_ACTIONS:
            raise ConfigError(f"{name} has {space.n} actions; at most {_MOST_ACTIONS} are supported")
        return int(space.n)
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None or len(space.shape) > 1 or not np.isfinite([low, high]).all():
        raise ConfigError(f"{name} takes neither one of several actions nor numbers between bounds: {_one_line(space)}")
    return Continuous(math.prod(space.shape))


def _one_line(space: Any) -> str:
    return " ".join(str(space).split())[:200]
