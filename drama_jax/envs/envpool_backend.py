"""Environments of EnvPool (C++ thread pool). Arguments arrive validated: EnvPool crashes on some bad ones.

EnvPool cannot save its state, and in some games an episode depends on those before it. So `Pool` remembers every action
since its emulators were made, and plays them again to get back to where it was. `EnvPoolEnv` is Atari;
`envpool_tasks.EnvPoolTask` is the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.config import AtariConfig, ConfigError
from drama_jax.envs.base import Observation, StateMismatch, check_actions, no_progress, pack_state, unpack_state

_RESET = 255
"""Stands for a call of `reset` among the actions played; among continuous ones NaN does."""


class Pool:
    """E emulators whose actions are remembered; implements `base.Env` but for what EnvPool's observations mean.

    Args:
      options: of `envpool.make`, among them `num_envs`.
      identity: what a saved state must agree on to be played on here; JSON.
      num_actions: what an action is; of at most 255.
      frame_shape: of a frame.
    """

    _pool: Any
    _last: Observation | None

    def __init__(
        self,
        options: dict[str, Any],
        identity: dict[str, Any],
        num_actions: ActionSpace,
        frame_shape: tuple[int, ...],
    ) -> None:
        self.num_envs = int(options["num_envs"])
        self.num_actions: ActionSpace = num_actions
        self.frame_shape = frame_shape
        self._options, self._identity = options, identity
        # How an action is remembered.
        self._kept = np.dtype((np.float32, num_actions.size) if isinstance(num_actions, Continuous) else np.uint8)
        self._start()

    def reset(self) -> Observation:
        """See `base.Env`."""
        frames, info = self._pool.reset()
        false = np.zeros(self.num_envs, np.bool_)
        mark = np.nan if isinstance(self.num_actions, Continuous) else _RESET
        self._played.extend(np.full(self.num_envs, mark, self._kept).tobytes())
        return self._keep(self._observation(frames, np.zeros(self.num_envs, np.float32), false, false, info))

    def step(self, actions: np.ndarray) -> Observation:
        """See `base.Env`."""
        if not self._played:
            raise RuntimeError("call reset() before step()")  # EnvPool would silently reset instead
        actions = check_actions(actions, self.num_envs, self.num_actions)
        outcome = self._pool.step(self._theirs(actions))
        self._played.extend(actions.astype(self._kept.base).tobytes())
        return self._keep(self._observation(*outcome))

    def get_state(self) -> bytes:
        """See `base.Env`."""
        if self._last is None:
            raise RuntimeError("call reset() before get_state()")
        header = {"identity": self._identity, "version": _version(), "last": _digest(self._last)}
        played = np.frombuffer(bytes(self._played), self._kept.base)
        return pack_state(header, {"played": played.reshape(-1, self.num_envs, *self._kept.shape)})

    def set_state(self, state: bytes, *, on_step: Callable[[int, int], None] = no_progress) -> Observation:
        """See `base.Env`. Plays everything again: of Atari, about a minute for 100,000 steps."""
        header, arrays = unpack_state(state)
        if header["identity"] != self._identity:
            raise ConfigError(
                f"the saved environment is {header['identity']}, this one is {self._identity}: use the saved settings"
            )
        self._start()
        if header["version"] != _version():
            raise StateMismatch(f"it was saved by envpool {header['version']}, this is {_version()}")
        played = arrays["played"]
        for done, actions in enumerate(played, 1):
            # An action is neither the mark nor NaN.
            is_reset = np.isnan(actions).any() if self._kept.shape else actions[0] == _RESET
            observation = self.reset() if is_reset else self.step(actions)
            on_step(done, len(played))
        if _digest(observation) != header["last"]:
            self._start()
            raise StateMismatch("its actions, played again, do not lead to the same picture")
        return observation

    def close(self) -> None:
        """See `base.Env`."""
        self._played, self._last = bytearray(), None
        self._pool = None  # its threads end with the object; its own close() keeps them

    def _start(self) -> None:
        """New emulators, in which nothing has been played."""
        self._pool = None  # before the new one, so that there is one at a time
        self._pool = import_envpool().make(**self._options)
        self._played = bytearray()  # [calls, E] uint8, or [calls, E, A] float32
        self._last = None

    def _keep(self, observation: Observation) -> Observation:
        self._last = observation
        return observation

    def _theirs(self, actions: np.ndarray) -> np.ndarray:
        """Checked actions as EnvPool takes them."""
        return actions

    def _observation(
        self, frames: Any, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> Observation:
        """What EnvPool returned, as what it means."""
        raise NotImplementedError


class EnvPoolEnv(Pool):
    """E copies of one Atari game. See `atari.make_atari` for the arguments."""

    def __init__(
        self, game: str, config: AtariConfig, *, num_envs: int, image_size: int, seed: int, num_threads: int
    ) -> None:
        self._life_loss_is_terminal = config.life_loss_is_terminal
        identity = {
            "game": game,
            "num_envs": num_envs,
            "image_size": image_size,
            "rules": repr(config),
            "seed": seed,
        }
        # Every option is named: EnvPool's defaults are grey, stacked, 84x84 frames with no-ops and FIRE at resets.
        options: dict[str, Any] = {
            "task_id": f"{game}-v5",
            "env_type": "gymnasium",
            "num_envs": num_envs,
            "batch_size": num_envs,
            "num_threads": num_threads,
            "seed": seed,
            "max_episode_steps": config.max_episode_steps,
            "stack_num": 1,
            "frame_skip": config.frame_skip,
            "noop_max": max(1, config.noop_max),  # 0 crashes it; 1 is exactly one no-op
            "use_fire_reset": False,
            "episodic_life": False,
            "zero_discount_on_life_loss": False,
            "reward_clip": False,
            "img_height": image_size,
            "img_width": image_size,
            "gray_scale": False,
            "use_inter_area_resize": True,
            "full_action_space": config.full_action_space,
            "repeat_action_probability": config.sticky_actions,
            "mode": -1,  # the game's own
            "difficulty": -1,
            "thread_affinity_offset": -1,
        }
        super().__init__(options, identity, 0, (image_size, image_size, 3))
        self.num_actions = int(self._pool.action_space.n)

    def _start(self) -> None:
        super()._start()
        self._lives = np.zeros(self.num_envs, np.int32)

    def _observation(
        self, frames: Any, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict[str, Any]
    ) -> Observation:
        first = info["elapsed_step"] == 0
        lives = np.array(info["lives"], np.int32)
        # The flag of the emulator itself: `terminated` is unset where the game is over on the last allowed step.
        over = (info["terminated"] != 0) & ~first
        life_lost = (lives < self._lives) & ~first
        self._lives = lives
        return Observation(
            frames=np.ascontiguousarray(frames.transpose(0, 2, 3, 1)),
            rewards=np.asarray(rewards, np.float32),
            terminals=over | life_lost if self._life_loss_is_terminal else over,
            last=terminated | truncated,
            truncated=truncated & ~over,
            first=first,
            lives=lives,
        )


def _digest(observation: Observation) -> str:
    """SHA-256 of all that was observed."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(field).tobytes() for field in observation)).hexdigest()


def _version() -> str:
    return str(import_envpool().__version__)


def import_envpool() -> Any:
    """The package, or a ConfigError that says how to get it."""
    try:
        import envpool
    except ModuleNotFoundError as error:
        raise ConfigError(
            "EnvPool is not installed: run python -m pip install -e '.[experiments]', or play through ale-py with "
            "--env-backend ale"
        ) from error
    return envpool
