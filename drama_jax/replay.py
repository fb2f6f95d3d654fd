"""Replay: the last `capacity` steps of experience as arrays on the device, with the sampler's counters.

The arrays are a ring. *Slots* number its places; *ages* number its entries in time, 0 being the oldest. Windows are
named by the age of their first entry, so that a window is always `length` consecutive steps: it reaches neither past
the newest entry nor across the write position. Windows may span an episode's end; `firsts` tells where.

Letters: N capacity, M windows, L window length, H, W, C frame height, width and channels, O entries of a vector in a
frame's place, A of a continuous action.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from drama_jax import action_space, checks, dfs
from drama_jax.action_space import ActionSpace
from drama_jax.config import ReplayConfig


@flax.struct.dataclass
class Transition:
    """One agent step."""

    frame: jax.Array  # [H, W, C] uint8 or [O] float32, what was seen before the action
    action: jax.Array  # [] int32 or [A] float32
    reward: jax.Array  # [] float32, earned by the action
    terminal: jax.Array  # [] bool, the action ended the episode or lost a life
    first: jax.Array  # [] bool, `frame` starts an episode


@flax.struct.dataclass
class Batch:
    """Windows of consecutive steps; the fields are those of `Transition`."""

    frames: jax.Array  # [M, L, H, W, C] uint8 or [M, L, O] float32
    actions: jax.Array  # [M, L] int32 or [M, L, A] float32
    rewards: jax.Array  # [M, L] float32
    terminals: jax.Array  # [M, L] bool
    firsts: jax.Array  # [M, L] bool


@flax.struct.dataclass
class Replay:
    """The ring. Entries at slots never written are zero and never sampled."""

    frames: jax.Array  # [N, H, W, C] uint8 or [N, O] float32
    actions: jax.Array  # [N] int32 or [N, A] float32
    rewards: jax.Array  # [N] float32
    terminals: jax.Array  # [N] bool
    firsts: jax.Array  # [N] bool
    position: jax.Array  # [] int32, the slot written next
    size: jax.Array  # [] int32, entries held, at most N
    counters: dfs.Counters  # [N] each, by slot of the window's first entry

    @property
    def capacity(self) -> int:
        """N."""
        return self.rewards.shape[-1]


def init(
    config: ReplayConfig,
    frame_shape: tuple[int, ...],
    num_actions: ActionSpace = 1,
    *,
    dtype: Literal["uint8", "float32"] = "uint8",
) -> Replay:
    """An empty replay.

    It takes `config.capacity * height * width * channels` bytes of device memory, and 18 more per entry.

    Args:
      config: its capacity.
      frame_shape: (height, width, channels) of a frame, or (entries,) of a vector.
      num_actions: whether actions are int32 or `Continuous`.
      dtype: of frames.
    """
    action_space.check("replay.init", num_actions)
    checks.instances("replay.init", config=(config, ReplayConfig), frame_shape=(frame_shape, tuple))
    if len(frame_shape) not in (1, 3):
        raise ValueError(
            f"replay.init: frame_shape must be (height, width, channels), or (entries,) of a vector, got {frame_shape}"
        )
    names = ("entries",) if len(frame_shape) == 1 else ("height", "width", "channels")
    checks.integers("replay.init", **dict(zip(names, frame_shape)))
    if dtype not in ("uint8", "float32"):
        raise ValueError(f"replay.init: dtype must be 'uint8' or 'float32', got {dtype!r}")
    n = config.capacity
    return Replay(
        frames=jnp.zeros((n, *frame_shape), dtype),
        actions=action_space.zeros(num_actions, (n,)),
        rewards=jnp.zeros(n, jnp.float32),
        terminals=jnp.zeros(n, jnp.bool_),
        firsts=jnp.zeros(n, jnp.bool_),
        position=jnp.zeros((), jnp.int32),
        size=jnp.zeros((), jnp.int32),
        counters=dfs.init(n),
    )


def add(replay: Replay, transition: Transition) -> Replay:
    """Appends one step, over the oldest entry if the ring is full; that slot's counters return to zero.

    Donate `replay` to the jitted caller: every array is then updated in place.
    """
    checks.instances("replay.add", replay=(replay, Replay), transition=(transition, Transition))
    checks.arrays(
        "replay.add",
        frame=(transition.frame, replay.frames.shape[1:], str(replay.frames.dtype)),
        action=(transition.action, replay.actions.shape[1:], str(replay.actions.dtype)),
        reward=(transition.reward, (), "float32"),
        terminal=(transition.terminal, (), "bool"),
        first=(transition.first, (), "bool"),
    )
    position = replay.position

    def write(array: jax.Array, value: jax.Array) -> jax.Array:
        # A dynamic_update_slice, not a scatter: XLA performs it in place on a donated array.
        return jax.lax.dynamic_update_index_in_dim(array, value, position, 0)

    zero = jnp.zeros((), jnp.int32)
    return dataclasses.replace(
        replay,
        frames=write(replay.frames, transition.frame),
        actions=write(replay.actions, transition.action),
        rewards=write(replay.rewards, transition.reward),
        terminals=write(replay.terminals, transition.terminal),
        firsts=write(replay.firsts, transition.first),
        position=(position + 1) % replay.capacity,
        size=jnp.minimum(replay.size + 1, replay.capacity),
        counters=dfs.Counters(
            trained=write(replay.counters.trained, zero),
            imagined=write(replay.counters.imagined, zero),
        ),
    )


def num_starts(replay: Replay, length: int) -> jax.Array:
    """Number of windows of `length` steps the replay holds, int32 []."""
    checks.instances("replay.num_starts", replay=(replay, Replay))
    checks.integers("replay.num_starts", length=length)
    return jnp.maximum(replay.size + 1 - length, 0)


@jax.named_scope("gather")
def gather(replay: Replay, starts: jax.Array, length: int) -> Batch:
    """The windows of `length` steps that begin at ages `starts` ([M] int32, each below `num_starts`)."""
    checks.instances("replay.gather", replay=(replay, Replay))
    checks.arrays("replay.gather", starts=(starts, ("M",), "integer"))
    checks.integers("replay.gather", 1, replay.capacity, length=length)
    where = slots(replay, starts[:, None] + jnp.arange(length, dtype=jnp.int32))
    return Batch(
        frames=replay.frames[where],
        actions=replay.actions[where],
        rewards=replay.rewards[where],
        terminals=replay.terminals[where],
        firsts=replay.firsts[where],
    )


def sample_training(
    config: ReplayConfig,
    replay: Replay,
    key: jax.Array,
    num: int,
    length: int,
    *,
    tau: float | jax.Array | None = None,
) -> tuple[jax.Array, Replay]:
    """Draws distinct windows for world-model training and counts them.

    Args:
      config: Sampler and its temperature.
      replay: The replay; must hold at least `num` windows.
      key: PRNG key, consumed.
      num: M, number of windows.
      length: L, steps of a window.
      tau: Overrides `config.tau`; may be traced.

    Returns:
      ([num] int32 ages of the starts, replay with `counters.trained` moved).
    """
    _check_draw("replay.sample_training", config, replay, key, num, length)
    counters = replay.counters
    logits = dfs.training_logits(counters.trained, config.tau if tau is None else tau)
    slots = _draw(config, replay, key, logits, num, length)
    counters = dataclasses.replace(counters, trained=dfs.increment(counters.trained, slots))
    return _ages(replay, slots), dataclasses.replace(replay, counters=counters)


def sample_imagination(
    config: ReplayConfig,
    replay: Replay,
    key: jax.Array,
    num: int,
    length: int,
    ratio: float,
    *,
    tau: float | jax.Array | None = None,
) -> tuple[jax.Array, Replay]:
    """Draws distinct windows to imagine from and counts them.

    Args:
      config: Sampler, its temperature and its weights alpha and beta.
      replay: The replay; must hold at least `num` windows.
      key: PRNG key, consumed.
      num: M, number of windows.
      length: L, steps of a window (the context).
      ratio: Imagination batch size over training batch size.
      tau: Overrides `config.imagination_tau`; may be traced.

    Returns:
      ([num] int32 ages of the starts, replay with `counters.imagined` moved).
    """
    _check_draw("replay.sample_imagination", config, replay, key, num, length)
    counters = replay.counters
    logits = dfs.imagination_logits(
        counters.trained,
        counters.imagined,
        ratio,
        config.imagination_tau if tau is None else tau,
        config.alpha,
        config.beta,
    )
    slots = _draw(config, replay, key, logits, num, length)
    counters = dataclasses.replace(counters, imagined=dfs.increment(counters.imagined, slots))
    return _ages(replay, slots), dataclasses.replace(replay, counters=counters)


def _check_draw(function: str, config: ReplayConfig, replay: Replay, key: jax.Array, num: int, length: int) -> None:
    checks.instances(function, config=(config, ReplayConfig), replay=(replay, Replay))
    checks.key(function, key)
    checks.integers(function, 1, replay.capacity, length=length)
    checks.integers(function, 1, replay.capacity + 1 - length, num=num)


def _draw(config: ReplayConfig, replay: Replay, key: jax.Array, logits: jax.Array, num: int, length: int) -> jax.Array:
    """[num] int32 slots of distinct window starts. Masking slots by age spares rolling the arrays into time order."""
    if config.sampler == "uniform":
        logits = jnp.zeros_like(logits)
    valid = _ages(replay, jnp.arange(replay.capacity, dtype=jnp.int32)) < num_starts(replay, length)
    return dfs.sample_masked(key, logits, valid, num)


def slots(replay: Replay, ages: jax.Array) -> jax.Array:
    """Where in the ring the entries of these ages are, int32 of the same shape."""
    return (replay.position - replay.size + ages) % replay.capacity


def _ages(replay: Replay, slots: jax.Array) -> jax.Array:
    """Ages of the entries in these slots; at least `size` for a slot not yet written."""
    return (slots - replay.position + replay.size) % replay.capacity
