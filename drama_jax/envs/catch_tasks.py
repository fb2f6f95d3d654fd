"""Catch with rewards that make replay sampling matter: a sparse one, and one that changes its mind.

The board has R rows and W columns. A ball starts in a random column of the top row and falls a row a step; the paddle
on the bottom row moves left, stays or moves right (actions 0, 1, 2). A ball that reaches the bottom row is caught if
the paddle is there. An episode is some balls, one after the other; it ends when the last one is down.

* `SparseCatch`: three balls, and a reward of 1 at the end if all three were caught; nothing before, and 0 otherwise.
  Random play is paid in one of 125 episodes.
* `PairCatch`: the same with two balls; random play is paid in one of 25 episodes.
* `SwitchingCatch`: one ball, caught 1, missed -1; every 3,000 steps the signs are swapped, without a sign of it on the
  board. What the replay says of rewards is then wrong for half of its entries.

The interface is gymnax's; nothing of gymnax is needed. `--env drama_jax.envs.catch_tasks:SparseCatch` names one in
`experiments.jax_env`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import checks
from drama_jax.envs.grid_world import Space


@flax.struct.dataclass
class CatchState:
    """Where an episode stands; `age` goes on through all of them."""

    ball: jax.Array  # [2] int32, row and column
    paddle: jax.Array  # [] int32, column
    fallen: jax.Array  # [] int32, balls that are down
    caught: jax.Array  # [] int32, balls that were caught
    age: jax.Array  # [] int32, steps since the environment was made


@flax.struct.dataclass
class CatchParams:
    """What can be changed without compiling anew: nothing but the switch."""

    steps_between_switches: int = 0  # 0: rewards never change sign


@dataclasses.dataclass(frozen=True)
class _Catch:
    """The rules that both tasks share; hashable, to be passed as a static argument."""

    rows: int = 10
    """R."""
    columns: int = 5
    """W."""
    balls: int = 1

    def __post_init__(self) -> None:
        checks.integers("Catch", 2, 64, rows=self.rows, columns=self.columns)
        checks.integers("Catch", 1, 64, balls=self.balls)

    @property
    def name(self) -> str:
        """For people."""
        return type(self).__name__

    @property
    def num_actions(self) -> int:
        """A: left, stay, right."""
        return 3

    @property
    def default_params(self) -> CatchParams:
        """Rewards that stay what they are."""
        return CatchParams()

    def observation_space(self, params: CatchParams) -> Space:
        """[R, W] of 0 and 1."""
        return Space((self.rows, self.columns), 0, 1)

    def reset(self, key: jax.Array, params: CatchParams | None = None) -> tuple[jax.Array, CatchState]:
        """Starts an episode: the first board [R, W] int32 and the state. The key is consumed."""
        checks.key("Catch.reset", key)
        zero = jnp.zeros((), jnp.int32)
        state = CatchState(
            ball=self._new_ball(key),
            paddle=jnp.asarray(self.columns // 2, jnp.int32),
            fallen=zero,
            caught=zero,
            age=zero,
        )
        return self.board(state), state

    def step(
        self, key: jax.Array, state: CatchState, action: jax.Array, params: CatchParams | None = None
    ) -> tuple[jax.Array, CatchState, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """Plays an action ([] int32): board, state, reward, terminated, truncated, {}. The key is consumed.

        Where the episode ends, board and state are the first of the next one.
        """
        checks.key("Catch.step", key)
        checks.instances("Catch.step", state=(state, CatchState))
        params = self.default_params if params is None else params
        ball_key, reset_key = jax.random.split(key)
        paddle = jnp.clip(state.paddle + action.astype(jnp.int32) - 1, 0, self.columns - 1)
        ball = state.ball + jnp.asarray([1, 0], jnp.int32)
        down = ball[0] == self.rows - 1
        hit = down & (ball[1] == paddle)
        moved = CatchState(
            ball=jnp.where(down, self._new_ball(ball_key), ball),
            paddle=paddle,
            fallen=state.fallen + down.astype(jnp.int32),
            caught=state.caught + hit.astype(jnp.int32),
            age=state.age + 1,
        )
        over = moved.fallen == self.balls
        reward = self.reward(moved, down, hit, over, params)
        first = dataclasses.replace(self.reset(reset_key)[1], age=moved.age)
        after: CatchState = jax.tree.map(functools.partial(jnp.where, over), first, moved)
        return self.board(after), after, reward, over, jnp.zeros((), bool), {}

    def reward(
        self, state: CatchState, down: jax.Array, hit: jax.Array, over: jax.Array, params: CatchParams
    ) -> jax.Array:
        """[] float32: of a step that led to `state`; a ball came down, was caught, was the last one ([] bool each)."""
        raise NotImplementedError

    def board(self, state: CatchState) -> jax.Array:
        """What is seen: [R, W] int32, ball and paddle 1."""
        board = jnp.zeros((self.rows, self.columns), jnp.int32).at[state.ball[0], state.ball[1]].set(1)
        return board.at[self.rows - 1, state.paddle].set(1)

    def _new_ball(self, key: jax.Array) -> jax.Array:
        column = jax.random.randint(key, (), 0, self.columns, jnp.int32)
        return jnp.stack([jnp.zeros((), jnp.int32), column])


@dataclasses.dataclass(frozen=True)
class SparseCatch(_Catch):
    """1 at the end of an episode in which every ball was caught."""

    balls: int = 3

    def reward(
        self, state: CatchState, down: jax.Array, hit: jax.Array, over: jax.Array, params: CatchParams
    ) -> jax.Array:
        """See the class."""
        return (over & (state.caught == self.balls)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PairCatch(SparseCatch):
    """`SparseCatch` with two balls an episode."""

    balls: int = 2


@dataclasses.dataclass(frozen=True)
class SwitchingCatch(_Catch):
    """1 for a ball that is caught, -1 for one that is missed; the other way round in every second period."""

    @property
    def default_params(self) -> CatchParams:
        """A switch every 3,000 steps."""
        return CatchParams(steps_between_switches=3_000)

    def reward(
        self, state: CatchState, down: jax.Array, hit: jax.Array, over: jax.Array, params: CatchParams
    ) -> jax.Array:
        """See the class."""
        period = jnp.asarray(params.steps_between_switches, jnp.int32)
        swapped = (period > 0) & ((state.age - 1) // jnp.maximum(period, 1) % 2 == 1)
        value = jnp.where(hit, 1.0, -1.0) * jnp.where(swapped, -1.0, 1.0)
        return jnp.where(down, value, 0.0).astype(jnp.float32)
