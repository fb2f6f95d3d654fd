"""Atari through EnvPool (C++ thread pool). Arguments arrive validated: EnvPool crashes on some bad ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from drama_jax.config import AtariConfig, ConfigError
from drama_jax.envs.base import Observation, check_actions


class EnvPoolEnv:
    """E copies of one game; implements `base.Env`. See `atari.make_atari` for the arguments."""

    def __init__(
        self, game: str, config: AtariConfig, *, num_envs: int, image_size: int, seed: int, num_threads: int
    ) -> None:
        self.num_envs = num_envs
        self.image_shape = (image_size, image_size, 3)
        self._life_loss_is_terminal = config.life_loss_is_terminal
        self._lives = np.zeros(num_envs, np.int32)
        self._started = False
        # Every option is named: EnvPool's defaults are grey, stacked, 84x84 frames with no-ops and FIRE at resets.
        self._pool: Any = _import_envpool().make(
            f"{game}-v5",
            env_type="gymnasium",
            num_envs=num_envs,
            batch_size=num_envs,
            num_threads=num_threads,
            seed=seed,
            max_episode_steps=config.max_episode_steps,
            stack_num=1,
            frame_skip=config.frame_skip,
            noop_max=max(1, config.noop_max),  # 0 crashes it; 1 is exactly one no-op
            use_fire_reset=False,
            episodic_life=False,
            zero_discount_on_life_loss=False,
            reward_clip=False,
            img_height=image_size,
            img_width=image_size,
            gray_scale=False,
            use_inter_area_resize=True,
            full_action_space=config.full_action_space,
            repeat_action_probability=config.sticky_actions,
            mode=-1,  # the game's own
            difficulty=-1,
            thread_affinity_offset=-1,
        )
        self.num_actions = int(self._pool.action_space.n)

    def reset(self) -> Observation:
        """See `base.Env`."""
        frames, info = self._pool.reset()
        false = np.zeros(self.num_envs, np.bool_)
        self._started = True
        return self._observation(frames, np.zeros(self.num_envs, np.float32), false, false, info)

    def step(self, actions: np.ndarray) -> Observation:
        """See `base.Env`."""
        if not self._started:
            raise RuntimeError("call reset() before step()")  # EnvPool would silently reset instead
        return self._observation(*self._pool.step(check_actions(actions, self.num_envs, self.num_actions)))

    def close(self) -> None:
        """See `base.Env`."""
        self._started = False
        self._pool = None  # its threads end with the object; its own close() keeps them

    def _observation(
        self, frames: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, info: dict
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


def _import_envpool() -> Any:
    try:
        import envpool
    except ModuleNotFoundError as error:
        raise ConfigError(
            "EnvPool is not installed: run pip install 'drama_jax[experiments]', or play through ale-py with "
            "--env-backend ale"
        ) from error
    return envpool
