"""Atari 2600 games, played through EnvPool or directly through the Arcade Learning Environment.

Both backends play the same game: `frame_skip` emulator frames per agent step, the pixel-wise maximum of the last two
of them, area-averaged to a square RGB frame; raw rewards; the game's own action set. They differ in two points:
EnvPool plays at least one no-op frame at a reset, and where a game ends before its last skipped frame the two may
show another final frame. A backend is imported when it is first asked for.
"""

from __future__ import annotations

from drama_jax.config import AtariConfig, ConfigError
from drama_jax.envs.base import Env
from drama_jax.envs.games import canonical_game

_INT32_MAX = 2**31 - 1


def make_atari(
    game: str, config: AtariConfig, *, num_envs: int, image_size: int, seed: int, num_threads: int = 0
) -> Env:
    """Starts `num_envs` copies of a game.

    Args:
      game: A name of `games.GAMES`, in CamelCase, snake_case or lower case.
      config: Backend and rules. `noop_max = 0` is exact with backend `ale`; EnvPool then plays one no-op.
      num_envs: E, at least 1.
      image_size: Height and width of a frame in pixels.
      seed: Environment i gets seed + i. It moves the number of no-ops and the sticky actions, nothing else.
      num_threads: Emulator threads; 0 is one per core, at most `num_envs`. Backend `ale` always uses one.

    Raises:
      ConfigError: unknown game, a number out of range, or a backend that is not installed.
    """
    game = canonical_game(game)
    if not isinstance(config, AtariConfig):
        raise ConfigError(f"config must be an AtariConfig, got a {type(config).__name__}")
    for name, value, low, high in (
        ("num_envs", num_envs, 1, 4096),
        ("image_size", image_size, 1, 160),
        ("num_threads", num_threads, 0, 4096),
        ("seed", seed, 0, _INT32_MAX - 4096),
        ("frame_skip", config.frame_skip, 1, _INT32_MAX),
        ("noop_max", config.noop_max, 0, _INT32_MAX),
        ("max_episode_steps", config.max_episode_steps, 1, _INT32_MAX),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    if config.backend == "ale":
        from drama_jax.envs.ale_backend import AleEnv

        return AleEnv(game, config, num_envs=num_envs, image_size=image_size, seed=seed)
    from drama_jax.envs.envpool_backend import EnvPoolEnv

    return EnvPoolEnv(game, config, num_envs=num_envs, image_size=image_size, seed=seed, num_threads=num_threads)
