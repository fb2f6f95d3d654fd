"""A scripted environment and an agent that only records, for tests of the host loop and the evaluation."""

from __future__ import annotations

import json
import types
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from drama_jax import replay
from drama_jax.config import ReplayConfig
from drama_jax.envs.base import Observation, StateMismatch

NUM_ACTIONS = 5
IMAGE_SHAPE = (2, 2, 1)
_ROWS = 64


class ScriptedEnv:
    """E environments whose episodes last `lengths[e]` steps, again and again.

    Every frame is filled with a number of its own. Every step earns 1, the last of an episode 100 more and is terminal,
    unless its environment is in `truncating`: then the episode is cut off. As in the real ones, the step after an
    episode's end ignores the action and returns the reset row.
    """

    frame_shape = IMAGE_SHAPE
    num_actions = NUM_ACTIONS

    def __init__(self, lengths: list[int], truncating: tuple[int, ...] = ()) -> None:
        self.num_envs = len(lengths)
        self.lengths, self.truncating = lengths, truncating
        self.time = [0] * self.num_envs
        self.ended = [False] * self.num_envs
        self.frame_number = 0
        self.rows: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.lost = False

    def reset(self) -> Observation:
        self.time, self.ended = [0] * self.num_envs, [False] * self.num_envs
        return self._observe([self._row(0.0, False, False, True) for _ in self.lengths])

    def step(self, actions: np.ndarray) -> Observation:
        assert actions.shape == (self.num_envs,) and actions.dtype == np.int32
        self.events.append("step")
        return self._observe([self._step(e, int(actions[e])) for e in range(self.num_envs)])

    def close(self) -> None:
        self.events.append("close")

    def get_state(self) -> bytes:
        return json.dumps([self.time, self.ended, self.frame_number, self.last_rows]).encode()

    def set_state(self, state: bytes, *, on_step: Any = None) -> Observation:
        if self.lost:
            raise StateMismatch("the script was lost")
        self.time, self.ended, self.frame_number, rows = json.loads(state)
        return self._observe(rows)

    def _step(self, e: int, action: int) -> dict[str, Any]:
        if self.ended[e]:
            self.ended[e], self.time[e] = False, 0
            return self._row(0.0, False, False, True)
        self.time[e] += 1
        last = self.time[e] == self.lengths[e]
        truncated = last and e in self.truncating
        self.ended[e] = last
        row = self._row(101.0 if last else 1.0, last and not truncated, last, False) | {"truncated": truncated}
        self.rows.append(row | {"env": e, "action": action})
        return row

    def _row(self, reward: float, terminal: bool, last: bool, first: bool) -> dict[str, Any]:
        self.frame_number += 1
        return {
            "frame": self.frame_number,
            "reward": reward,
            "terminal": terminal,
            "last": last,
            "first": first,
            "truncated": False,
        }

    def _observe(self, rows: list[dict[str, Any]]) -> Observation:
        self.last_rows = rows
        frames = np.stack([np.full(IMAGE_SHAPE, row["frame"] % 256, np.uint8) for row in rows])

        def flags(name: str) -> np.ndarray:
            return np.array([row[name] for row in rows])

        return Observation(
            frames=frames,
            rewards=flags("reward").astype(np.float32),
            terminals=flags("terminal"),
            last=flags("last"),
            truncated=flags("truncated"),
            first=flags("first"),
            lives=np.zeros(self.num_envs, np.int32),
        )


@flax.struct.dataclass
class RecordingState:
    """The transitions given to the agent, in order."""

    frames: jax.Array  # [_ROWS] int32, the number in the frame
    actions: jax.Array  # [_ROWS] int32
    rewards: jax.Array  # [_ROWS] float32
    terminals: jax.Array  # [_ROWS] bool
    firsts: jax.Array  # [_ROWS] bool
    trained: jax.Array  # [_ROWS] bool, given to `update` rather than to `observe`
    count: jax.Array  # [] int32
    replay: replay.Replay  # stays empty


def init(*_: Any) -> RecordingState:
    integers, flags = jnp.zeros(_ROWS, jnp.int32), jnp.zeros(_ROWS, jnp.bool_)
    count = jnp.zeros((), jnp.int32)
    memory = replay.init(ReplayConfig(capacity=_ROWS), IMAGE_SHAPE)
    return RecordingState(integers, integers.copy(), jnp.zeros(_ROWS), flags, flags.copy(), flags.copy(), count, memory)


def _append(state: RecordingState, transition: Any, trained: bool) -> RecordingState:
    n = state.count
    return state.replace(
        frames=state.frames.at[n].set(transition.frame[0, 0, 0].astype(jnp.int32)),
        actions=state.actions.at[n].set(transition.action),
        rewards=state.rewards.at[n].set(transition.reward),
        terminals=state.terminals.at[n].set(transition.terminal),
        firsts=state.firsts.at[n].set(transition.first),
        trained=state.trained.at[n].set(trained),
        count=n + 1,
    )


def update(state: RecordingState, transition: Any) -> tuple[RecordingState, dict[str, jax.Array]]:
    return _append(state, transition, True), {"loss": state.count.astype(jnp.float32)}


def act(
    state: RecordingState,
    acting: dict[str, jax.Array],
    frames: jax.Array,
    key: jax.Array,
    first: jax.Array,
    *,
    greedy: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The action is a function of the frame, so that a test can tell which frame an action was chosen in.

    `acting` counts the steps of the episode. A greedy action never is NUM_ACTIONS - 1.
    """
    acting = {"steps": jnp.where(first, 0, acting["steps"]) + 1}
    return frames[:, 0, 0, 0].astype(jnp.int32) % (NUM_ACTIONS - 1 if greedy else NUM_ACTIONS), acting


AGENT = types.SimpleNamespace(
    observe=lambda state, transition: _append(state, transition, False),
    update=update,
    act=act,
    player=lambda state: state,
    initial_acting=lambda state, num_envs: {"steps": jnp.zeros(num_envs, jnp.int32)},
    initial_encoded_acting=lambda state, num_envs: {"steps": jnp.zeros(num_envs, jnp.int32)},
    state_metrics=lambda state: {
        "replay/size": state.count.astype(jnp.float32),
        "guard/skipped_in_a_row": jnp.zeros((), jnp.float32),
    },
)
