"""An agent of a run: what it brings to the training, and what comes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from drama_jax.envs.base import Env
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.logging import Writer


@dataclasses.dataclass
class Member:
    """One agent of a run: what it does not share with the others."""

    environment: Env
    """One environment (`num_envs` 1), freshly made."""
    key: jax.Array
    """PRNG key, consumed."""
    writer: Writer
    """Where scalars and images go."""
    checkpoints: Checkpoints | None = None
    """Where checkpoints go, one every `logging.checkpoint_every` steps, one at the end, and one where the training is
    ended early."""
    snapshot: Snapshot | None = None
    """Where to go on from; None to start at step 0. Those of all members are of the same step."""


@dataclasses.dataclass
class Training:
    """What came of one agent's training."""

    state: Any
    """AgentState after the last update; of several agents, without the replay."""
    returns: list[tuple[int, float]]
    """(agent step at the end, undiscounted raw return) of each episode, whole games with the terminal reward."""
    wall_clock_s: float
    """Of all parts of a run that was interrupted."""
    this_part_s: float
    """Of the last of them."""
    ms_per_step: float | None
    """Median time of a step with an update, over all parts; None if there was no update."""
    stopped: int | None = None
    """The agent step at which `stop` ended it; None if it was trained to its end."""
    fault: str | None = None
    """What ended the training early, other than `stop`: a failing emulator, updates that are not finite; else None."""
