"""A grid world in which the next frame can only be told by who remembers the steps long past.

After the long-sequence study of the paper (arXiv 2410.08893): a frame is 5 x 5 cells, and with the action that follows
it makes 26 tokens, so that 8 steps are 208 tokens and 64 steps 1664. The study's environment was not released. These
rules are our own:

* At the start of an episode every cell gets a colour 1..C, uniformly and independently; it keeps it to the end. The
  agent starts in the middle.
* A frame shows the colour of the cell that the agent is on. Every other cell is covered: 0.
* The actions 0..3 move the agent up, down, left, right. At the border it stays where it is.
* The reward is 1 for a cell that the agent enters for the first time in the episode, else 0: at most 24.
* An episode is cut off after `max_steps_in_episode` steps; it has no end of its own.

Where the agent will be follows from the frame and the action. The colour there does not: it is the one that was shown
when the agent was there last, 2 or 60 steps ago, and cannot be told (but by 1 in C) where it has never been. The reward
asks the same of memory. `GridWorld.gap` says how far back one has to remember, so that errors can be told apart by it.

The interface is gymnax's; nothing of gymnax is needed. `--env drama_jax.envs.grid_world:GridWorld` is the name of this
environment in `experiments.jax_env`. Shapes: R rows = columns, T steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import checks

_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


@flax.struct.dataclass
class GridState:
    """Where an episode stands."""

    colours: jax.Array  # [R, R] int32, 1..C
    shown: jax.Array  # [R, R] int32, the step whose frame has shown the cell last; -1: none
    position: jax.Array  # [2] int32, row and column
    time: jax.Array  # [] int32, steps taken in this episode


@flax.struct.dataclass
class GridParams:
    """What can be changed without compiling anew."""

    max_steps_in_episode: int = 64


class Space(NamedTuple):
    """What an observation may be."""

    shape: tuple[int, ...]
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class GridWorld:
    """The environment; hashable, to be passed as a static argument.

    Raises:
      TypeError, ValueError: if the grid has no middle (`size` is even), or there are fewer than two colours.
    """

    size: int = 5
    """R."""
    colours: int = 4
    """C."""

    def __post_init__(self) -> None:
        checks.integers("GridWorld", 3, 63, size=self.size)
        checks.integers("GridWorld", 2, 255, colours=self.colours)
        if self.size % 2 == 0:
            raise ValueError(f"GridWorld: size must be odd, so that there is a middle, got {self.size}")

    @property
    def name(self) -> str:
        """For people."""
        return "GridWorld"

    @property
    def num_actions(self) -> int:
        """A."""
        return len(_MOVES)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary of `tokens`."""
        return self.colours + 1 + self.num_actions

    @property
    def default_params(self) -> GridParams:
        """Episodes of 64 steps."""
        return GridParams()

    def observation_space(self, params: GridParams) -> Space:
        """[R, R] of 0..C."""
        return Space((self.size, self.size), 0, self.colours)

    def reset(self, key: jax.Array, params: GridParams | None = None) -> tuple[jax.Array, GridState]:
        """Starts an episode: the first frame [R, R] int32 and the state. The key is consumed."""
        checks.key("GridWorld.reset", key)
        shape = (self.size, self.size)
        middle = jnp.full(2, self.size // 2, jnp.int32)
        state = GridState(
            colours=jax.random.randint(key, shape, 1, self.colours + 1, jnp.int32),
            shown=jnp.full(shape, -1, jnp.int32).at[middle[0], middle[1]].set(0),
            position=middle,
            time=jnp.zeros((), jnp.int32),
        )
        return self.frame(state), state

    def step(
        self, key: jax.Array, state: GridState, action: jax.Array, params: GridParams | None = None
    ) -> tuple[jax.Array, GridState, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """Plays an action ([] int32): frame, state, reward, terminated, truncated, {}. The key is consumed.

        Where the episode is cut off, frame and state are the first of the next one.
        """
        checks.key("GridWorld.step", key)
        checks.instances("GridWorld.step", state=(state, GridState))
        limit = (self.default_params if params is None else params).max_steps_in_episode
        reward = (self.gap(state, action) == 0).astype(jnp.float32)
        row, column = position = self._after(state, action)
        time = state.time + 1
        moved = dataclasses.replace(state, position=position, shown=state.shown.at[row, column].set(time), time=time)
        truncated = time >= limit
        frame, state = jax.tree.map(
            functools.partial(jnp.where, truncated), self.reset(key), (self.frame(moved), moved)
        )
        return frame, state, reward, jnp.zeros((), bool), truncated, {}

    def frame(self, state: GridState) -> jax.Array:
        """What is seen: [R, R] int32."""
        row, column = state.position
        return jnp.zeros_like(state.colours).at[row, column].set(state.colours[row, column])

    def gap(self, state: GridState, action: jax.Array) -> jax.Array:
        """Steps from the frame that has last shown what the next one will show to that next one, [] int32; 0: never."""
        row, column = self._after(state, action)
        shown = state.shown[row, column]
        return jnp.where(shown < 0, 0, state.time + 1 - shown)

    def _after(self, state: GridState, action: jax.Array) -> jax.Array:
        """Where the action leads to, [2] int32."""
        moves = jnp.asarray(_MOVES, jnp.int32)
        return jnp.clip(state.position + moves[action], 0, self.size - 1)

    def tokens(self, frames: jax.Array, actions: jax.Array) -> jax.Array:
        """Frames [..., T, R, R] and the actions after them [..., T] as one sequence [..., T (R R + 1)] int32.

        Row by row, then the action: 0..C are cells, C + 1.. are actions.
        """
        size = self.size
        checks.arrays("GridWorld.tokens", frames=(frames, (..., "T", size, size), "int32"))
        checks.arrays("GridWorld.tokens", actions=(actions, frames.shape[:-2], "int32"))
        cells = frames.reshape(*actions.shape, size * size)
        each = jnp.concatenate([cells, actions[..., None] + self.colours + 1], axis=-1)
        return each.reshape(*actions.shape[:-1], -1)


@flax.struct.dataclass
class Walk:
    """An episode of random actions."""

    frames: jax.Array  # [T, R, R] int32
    actions: jax.Array  # [T] int32, taken after the frame of the same index
    rewards: jax.Array  # [T] float32, for the action
    gaps: jax.Array  # [T] int32, see `GridWorld.gap`: of frame t, so that gaps[0] = 0


@functools.partial(jax.jit, static_argnums=(0, 2))
def walk(env: GridWorld, key: jax.Array, steps: int) -> Walk:
    """The first `steps` frames of an episode, under uniformly random actions. The key is consumed.

    A data set for the study of sequence models: vmap it over keys.
    """
    checks.instances("grid_world.walk", env=(env, GridWorld))
    checks.key("grid_world.walk", key)
    checks.integers("grid_world.walk", steps=steps)
    key, reset_key = jax.random.split(key)
    frame, state = env.reset(reset_key)
    params = GridParams(max_steps_in_episode=steps + 1)

    def body(carry: Any, key: jax.Array) -> tuple[Any, Walk]:
        frame, state, gap = carry
        action_key, step_key = jax.random.split(key)
        action = jax.random.randint(action_key, (), 0, env.num_actions, jnp.int32)
        after, following, reward, *_ = env.step(step_key, state, action, params)
        row = Walk(frames=frame, actions=action, rewards=reward, gaps=gap)
        return (after, following, env.gap(state, action)), row

    start = frame, state, jnp.zeros((), jnp.int32)
    _, rows = jax.lax.scan(body, start, jax.random.split(key, steps))
    return rows
