"""What the training loop keeps from one step to the next besides the agent, and how it is saved and restored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from drama_jax.envs.base import Env, Observation, StateMismatch, attempt
from drama_jax.training import arrays, replay_log
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.logging import MeanMetrics
from drama_jax.training.replay_log import Row


@dataclasses.dataclass
class Pending:
    """A transition that the agent has not been given yet."""

    row: Row
    frames: jax.Array  # [1, H, W, C] uint8, those of the row, already on the device

    def arrays(self) -> tuple[Any, ...]:
        """The fields of a `replay.Transition`, with the environment axis."""
        return self.frames, *self.row[1:]


@dataclasses.dataclass
class LoopState:
    """The loop between two steps."""

    act_key: jax.Array
    """Every step's key is derived from it by the step's number; never consumed itself."""
    image_key: jax.Array
    """Likewise, of the images."""
    warmup_rng: np.random.Generator
    acting: Any
    """`agent.Acting`."""
    metrics: MeanMetrics = dataclasses.field(default_factory=MeanMetrics)
    pending: Pending | None = None
    fed: int = 0
    """Transitions the agent has been given."""
    episode_return: float = 0.0
    episode_length: int = 0
    returns: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """(agent step at the end, return) of every episode."""
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    """Of every step with an update."""
    seconds_before: float = 0.0
    """Wall clock of earlier parts of the run."""

    @classmethod
    def fresh(cls, key: jax.Array, acting: Any) -> LoopState:
        """At step 0. The key is consumed."""
        act_key, image_key, warmup_key = jax.random.split(key, 3)
        return cls(act_key, image_key, np.random.default_rng(np.asarray(jax.random.bits(warmup_key, (4,)))), acting)

    def snapshot(self, step: int, state: Any, environment: Env, seconds: float, say: Callable[[str], None]) -> Snapshot:
        """A copy of everything on the host, which later steps do not change. Waits for the device.

        Args:
          step: Agent steps done.
          state: `AgentState`.
          environment: Its state is asked for.
          seconds: Wall clock of the run so far.
          say: Shows a message to the user, if the environment has failed and gives no state.
        """
        device = {
            "agent": dataclasses.replace(state, replay=replay_log.without_rows(state.replay)),
            "acting": self.acting,
            "keys": {"act": self.act_key, "image": self.image_key},
            "metrics": self.metrics.sums,
        }
        header = {
            "episode_return": self.episode_return,
            "episode_length": self.episode_length,
            "returns": list(self.returns),  # a copy: it is written while the loop goes on
            "metrics_count": self.metrics.count,
            "warmup_rng": self.warmup_rng.bit_generator.state,
            "seconds": seconds,
        }
        host = {"step_seconds": np.asarray(self.step_seconds, np.float32)}
        try:
            host["environment"] = np.frombuffer(environment.get_state(), np.uint8)
        except (RuntimeError, ValueError, OSError) as error:
            say(f"the emulator's state cannot be saved ({error})")
        if self.pending is not None:
            host |= {f"pending_{name}": array for name, array in self.pending.row._asdict().items()}
        return Snapshot(step, self.fed, arrays.to_host(device), header, host)

    def restore(
        self,
        snapshot: Snapshot,
        environment: Env,
        on_step: Callable[[int, int], None],
        say: Callable[[str], None],
    ) -> Observation:
        """Returns to a snapshot, and the environment to what it was; returns the observation to act on next.

        If the environment does not get there, the episode is cut off and another one begins.

        Args:
          snapshot: Where to.
          environment: Freshly made.
          on_step: See `Env.set_state`.
          say: Shows a message to the user.

        Raises:
          ConfigError: the arrays are not those of this configuration.
          EmulatorError: the environment failed.
        """
        device, header, host = snapshot.device, snapshot.header, snapshot.host
        self.acting = arrays.from_host(self.acting, device, "acting/")
        keys = arrays.from_host({"act": self.act_key, "image": self.image_key}, device, "keys/")
        self.act_key, self.image_key = keys["act"], keys["image"]
        self.metrics.restore(device, "metrics/", header["metrics_count"])
        self.warmup_rng.bit_generator.state = header["warmup_rng"]
        self.fed, self.seconds_before = snapshot.end, header["seconds"]
        self.episode_return, self.episode_length = header["episode_return"], header["episode_length"]
        self.returns = [(step, value) for step, value in header["returns"]]
        self.step_seconds = host["step_seconds"].tolist()
        if "pending_frames" in host:
            row = Row(*(host[f"pending_{name}"] for name in Row._fields))
            self.pending = Pending(row, jax.device_put(row.frames, may_alias=False))
        try:
            if "environment" not in host:
                raise StateMismatch("it was not saved")
            return attempt(environment.set_state, host["environment"].tobytes(), on_step=on_step)
        except StateMismatch as error:
            say(
                f"the emulator cannot be brought back to where it was ({error}); the running episode is cut off there "
                f"as truncated, and a new one begins"
            )
        # The next row says `first`, and the last one stored is no terminal: that is what a truncation looks like.
        self.episode_return, self.episode_length = 0.0, 0
        return attempt(environment.reset)
