"""Atari through ale-py, one emulator after the other: zero no-ops at a reset, and a state that can be saved.

ale-py holds Python's global lock while it emulates, so threads would not help.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from drama_jax.config import AtariConfig, ConfigError
from drama_jax.envs.base import Observation, StateMismatch, check_actions, no_progress, pack_state, unpack_state
from drama_jax.envs.games import rom_name
from drama_jax.envs.resize import AreaResize

_SETTLING_FRAMES = 60


class AleEnv:
    """E copies of one game; implements `base.Env`. See `atari.make_atari` for the arguments."""

    def __init__(self, game: str, config: AtariConfig, *, num_envs: int, image_size: int, seed: int) -> None:
        self.num_envs = num_envs
        self.frame_shape = (image_size, image_size, 3)
        self._config = config
        ale_py, rom = _import_ale(game)
        self._ale_py = ale_py
        self._emulators = [_Emulator(ale_py, rom, config, image_size, seed + i) for i in range(num_envs)]
        self.num_actions = len(self._emulators[0].actions)
        # What a checkpoint must agree on to be played on here.
        self._identity = {"game": game, "num_envs": num_envs, "image_size": image_size, "rules": repr(config)}
        self._observation: Observation | None = None

    def reset(self) -> Observation:
        """See `base.Env`."""
        return self._stack([emulator.reset() for emulator in self._emulators])

    def step(self, actions: np.ndarray) -> Observation:
        """See `base.Env`."""
        if self._observation is None:
            raise RuntimeError("call reset() before step()")
        actions = check_actions(actions, self.num_envs, self.num_actions)
        ended = self._observation.last
        return self._stack(
            [
                emulator.reset() if over else emulator.step(int(action))
                for emulator, action, over in zip(self._emulators, actions, ended)
            ]
        )

    def close(self) -> None:
        """See `base.Env`."""
        self._emulators = []
        self._observation = None

    def get_state(self) -> bytes:
        """See `base.Env`."""
        if self._observation is None:
            raise RuntimeError("call reset() before get_state()")
        arrays: dict[str, Any] = dict(zip(self._observation._fields, self._observation))
        for i, emulator in enumerate(self._emulators):
            arrays[f"emulator{i}"] = np.frombuffer(emulator.get_state(), np.uint8)
        header = {
            "identity": self._identity,
            "version": self._ale_py.__version__,
            "emulators": [emulator.variables() for emulator in self._emulators],
        }
        return pack_state(header, arrays)

    def set_state(self, state: bytes, *, on_step: Callable[[int, int], None] = no_progress) -> Observation:
        """See `base.Env`."""
        del on_step  # it is done at once
        header, arrays = unpack_state(state)
        if header["identity"] != self._identity:
            raise ConfigError(
                f"the saved environment is {header['identity']}, this one is {self._identity}: use the saved settings"
            )
        if header["version"] != self._ale_py.__version__:
            raise StateMismatch(f"it was saved by ale-py {header['version']}, this is {self._ale_py.__version__}")
        for i, (emulator, variables) in enumerate(zip(self._emulators, header["emulators"])):
            emulator.set_state(self._ale_py, arrays[f"emulator{i}"].tobytes(), variables)
        self._observation = Observation(**{name: arrays[name] for name in Observation._fields})
        return self._observation

    def _stack(self, rows: list[Observation]) -> Observation:
        self._observation = Observation(*(np.stack(column) for column in zip(*rows)))
        return self._observation


class _Emulator:
    """One game; its observations are rows of `Observation`."""

    def __init__(self, ale_py: Any, rom: str, config: AtariConfig, image_size: int, seed: int) -> None:
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._ale = ale_py.ALEInterface()
        self._ale.setInt("random_seed", seed)
        # Actions are made sticky here: the emulator would not save which action it is repeating.
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.loadROM(rom)
        full = config.full_action_space
        self.actions = self._ale.getLegalActionSet() if full else self._ale.getMinimalActionSet()
        height, width = self._ale.getScreenDims()
        self._resize = AreaResize(height, width, image_size)
        self._screens = np.zeros((2, height, width, 3), np.uint8)  # the last two frames of a step
        self._lives = 0
        self._steps = 0
        self._action = 0  # what the emulator plays now; every action set begins with NOOP

    def reset(self) -> Observation:
        """Starts a game and plays 1..noop_max no-op frames (none if noop_max is 0)."""
        self._ale.reset_game()
        noops = int(self._rng.integers(1, self._config.noop_max + 1)) if self._config.noop_max else 0
        for _ in range(noops):
            self._ale.act(self.actions[0])
            if self._ale.game_over():
                self._ale.reset_game()
        self._action = 0
        self._ale.getScreenRGB(self._screens[0])
        self._lives = self._ale.lives()
        self._steps = 0
        return self._row(self._screens[0], reward=0, first=True)

    def step(self, action: int) -> Observation:
        """Repeats an action for `frame_skip` frames, or until the game is over; a lost life does not cut it short."""
        sticky = self._rng.random(self._config.frame_skip) < self._config.sticky_actions
        reward = 0
        played = 0
        for frame in range(self._config.frame_skip):
            if not sticky[frame]:
                self._action = action
            reward += self._ale.act(self.actions[self._action])
            over = self._ale.game_over()
            # The maximum is over the last two frames; a game over before these shows the frame it ended on.
            if over or frame >= self._config.frame_skip - 2:
                self._ale.getScreenRGB(self._screens[played % 2])
                played += 1
            if over:
                break
        self._steps += 1
        image = np.maximum(self._screens[0], self._screens[1]) if played == 2 else self._screens[0]
        return self._row(image, reward, first=False)

    def get_state(self) -> bytes:
        """The emulator's own state."""
        state: bytes = self._ale.cloneState(include_rng=True).__getstate__()
        return state

    def variables(self) -> dict[str, Any]:
        """What this class keeps between steps, as JSON."""
        rng = self._rng.bit_generator.state
        return {"rng": rng, "lives": self._lives, "steps": self._steps, "action": self._action}

    def set_state(self, ale_py: Any, state: bytes, variables: dict[str, Any]) -> None:
        """Restores `get_state()` and `variables()`."""
        # Something the saved state lacks settles in the first frames played: without them Qbert goes on differently.
        self._ale.reset_game()
        for _ in range(_SETTLING_FRAMES):
            self._ale.act(self.actions[0])
        self._ale.restoreState(ale_py.ALEState(state))
        self._rng.bit_generator.state = variables["rng"]
        self._lives = variables["lives"]
        self._steps = variables["steps"]
        self._action = variables["action"]

    def _row(self, image: np.ndarray, reward: int, *, first: bool) -> Observation:
        over = self._ale.game_over()
        lives = self._ale.lives()
        terminal = over or (self._config.life_loss_is_terminal and lives < self._lives)
        truncated = self._steps >= self._config.max_episode_steps and not over
        self._lives = lives
        return Observation(
            frames=self._resize(image),
            rewards=np.asarray(reward, np.float32),
            terminals=np.asarray(terminal),
            last=np.asarray(over or truncated),
            truncated=np.asarray(truncated),
            first=np.asarray(first),
            lives=np.asarray(lives, np.int32),
        )


def _import_ale(game: str) -> tuple[Any, str]:
    try:
        import ale_py
        from ale_py import roms
    except ModuleNotFoundError as error:
        raise ConfigError("ale-py is not installed: run python -m pip install -e '.[ale]'") from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    return ale_py, str(roms.get_rom_path(rom_name(game)))
