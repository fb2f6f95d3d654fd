"""What the training loop keeps from one step to the next besides the agents, and how it is saved and restored.

Shapes: N agents, each with one environment. Arrays on the device lie as `together.Together` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax.action_space import ActionSpace, Continuous
from drama_jax.envs.base import Env, Observation, StateMismatch, attempt
from drama_jax.training import arrays, replay_log
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.clock import Clock
from drama_jax.training.logging import MeanMetrics
from drama_jax.training.replay_log import Row
from drama_jax.training.together import Together

Say = Callable[[str], None]


@dataclasses.dataclass
class Pending:
    """Transitions, one per agent, that the agents have not been given yet."""

    rows: Row  # [N, ...]
    frames: jax.Array  # [N, H, W, C] uint8 (or [N, O] float32), those of the rows, already on the device

    def arrays(self) -> tuple[Any, ...]:
        """The fields of a `replay.Transition`, [N, ...]."""
        return self.frames, *self.rows[1:]

    def row(self, index: int) -> Row:
        """The row of one agent, with the environment axis E = 1."""
        return Row(*(column[index : index + 1] for column in self.rows))


@dataclasses.dataclass
class Seat:
    """What the loop keeps for one agent on the host."""

    act_key: jax.Array
    """Every step's key is derived from it by the step's number; never consumed itself."""
    image_key: jax.Array
    """Likewise, of the images."""
    warmup_rng: np.random.Generator
    warmup_action: np.ndarray | None = None
    """[1] int32 or [1, A] float32: the random action that goes on."""
    warmup_left: int = 0
    """For how many steps more."""
    episode_return: float = 0.0
    episode_length: int = 0
    returns: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """(agent step at the end, return) of every episode."""

    @classmethod
    def fresh(cls, key: jax.Array) -> Seat:
        """At step 0. The key is consumed."""
        act_key, image_key, warmup_key = jax.random.split(key, 3)
        return cls(act_key, image_key, np.random.default_rng(np.asarray(jax.random.bits(warmup_key, (4,)))))

    def random_action(self, num_actions: ActionSpace, durations: np.ndarray | None) -> np.ndarray:
        """A uniformly random action, [1] int32 or [1, A] float32, or the one before as long as it lasts.

        Args:
          num_actions: A of the game, or `Continuous(A)`.
          durations: `exploration.duration_table`; None if no action is repeated.
        """
        if self.warmup_action is None or self.warmup_left == 0:
            if isinstance(num_actions, Continuous):
                self.warmup_action = self.warmup_rng.uniform(-1, 1, (1, num_actions.size)).astype(np.float32)
            else:
                self.warmup_action = self.warmup_rng.integers(num_actions, size=1, dtype=np.int32)
            self.warmup_left = 1
            if durations is not None:
                self.warmup_left += int(np.searchsorted(durations[:-1], self.warmup_rng.random(), side="right"))
        self.warmup_left -= 1
        return self.warmup_action

    def header(self) -> dict[str, Any]:
        """What a snapshot keeps of it as JSON."""
        return {
            "episode_return": self.episode_return,
            "episode_length": self.episode_length,
            "returns": list(self.returns),  # a copy: it is written while the loop goes on
            "warmup_rng": self.warmup_rng.bit_generator.state,
            "warmup_action": None if self.warmup_action is None else self.warmup_action.tolist(),
            "warmup_left": self.warmup_left,
        }

    def restore_warmup(self, header: dict[str, Any]) -> None:
        """The random play of a `header`."""
        self.warmup_rng.bit_generator.state = header["warmup_rng"]
        self.warmup_left = header.get("warmup_left", 0)  # checkpoints of older versions have neither
        if (action := header.get("warmup_action")) is not None:
            dtype = np.int32 if isinstance(action[0], int) else np.float32
            self.warmup_action = np.asarray(action, dtype)

    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot."""
        keys = arrays.from_host({"act": self.act_key, "image": self.image_key}, snapshot.device, "keys/")
        self.act_key, self.image_key = keys["act"], keys["image"]
        header = snapshot.header
        self.restore_warmup(header)
        self.episode_return, self.episode_length = header["episode_return"], header["episode_length"]
        self.returns = [(step, value) for step, value in header["returns"]]


@dataclasses.dataclass
class LoopState:
    """The loop between two steps."""

    together: Together
    seats: list[Seat]
    acting: Any
    """`agent.Acting` of every agent."""
    metrics: MeanMetrics = dataclasses.field(default_factory=MeanMetrics)
    pending: Pending | None = None
    fed: int = 0
    """Transitions each agent has been given."""
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    """Of every step with an update."""
    clock: Clock = dataclasses.field(default_factory=Clock)
    """Of all parts of the run."""

    @classmethod
    def fresh(cls, together: Together, keys: Sequence[jax.Array], acting: Any) -> LoopState:
        """At step 0. The keys, one per agent, are consumed."""
        return cls(together, [Seat.fresh(key) for key in keys], acting)

    def snapshots(self, step: int, state: Any, environments: Sequence[Env | None], say: Say) -> list[Snapshot]:
        """Copies of everything on the host, one per agent, which later steps do not change. Waits for the device.

        Args:
          step: Agent steps done.
          state: `AgentState` of all agents.
          environments: One per agent, their states are asked for; None for one whose state is of no use.
          say: Shows a message to the user, if an environment has failed and gives no state.
        """
        common = {
            "agent": dataclasses.replace(state, replay=replay_log.without_rows(state.replay)),
            "acting": self.acting,
            "metrics": self.metrics.sums,
        }
        device = arrays.to_host(common)
        counts = {"metrics_count": self.metrics.count, "seconds": self.clock.total}
        return [
            Snapshot(
                step=step,
                end=self.fed,
                device=self.together.of_host(device, index)
                | arrays.to_host({"keys": {"act": seat.act_key, "image": seat.image_key}}),
                header=seat.header() | counts,
                host=self._host(index, environment, say),
            )
            for index, (seat, environment) in enumerate(zip(self.seats, environments, strict=True))
        ]

    def _host(self, index: int, environment: Env | None, say: Say) -> dict[str, np.ndarray]:
        host = {"step_seconds": np.asarray(self.step_seconds, np.float32)}
        try:
            if environment is not None:
                host["environment"] = np.frombuffer(environment.get_state(), np.uint8)
        except (RuntimeError, ValueError, OSError) as error:
            say(f"the emulator's state cannot be saved ({error})")
        if self.pending is not None:
            host |= {f"pending_{name}": array for name, array in self.pending.row(index)._asdict().items()}
        return host

    def restore(
        self,
        snapshots: Sequence[Snapshot],
        environments: Sequence[Env],
        on_step: Callable[[int, int], None],
        say: Say,
    ) -> list[Observation]:
        """Returns to snapshots of one step, and the environments to what they were.

        If an environment does not get there, its episode is cut off and another one begins.

        Args:
          snapshots: Where to, one per agent.
          environments: Freshly made, one per agent.
          on_step: See `Env.set_state`.
          say: Shows a message to the user.

        Returns:
          The observations to act on next, one per agent.

        Raises:
          ConfigError: the arrays are not those of this configuration.
          EmulatorError: an environment failed.
        """
        for seat, snapshot in zip(self.seats, snapshots, strict=True):
            seat.restore(snapshot)
        self._restore_device(snapshots)
        first = snapshots[0]
        self.fed, self.clock.before = first.end, first.header["seconds"]
        self.step_seconds = first.host["step_seconds"].tolist()
        if "pending_frames" in first.host:
            columns = ([snapshot.host[f"pending_{name}"] for snapshot in snapshots] for name in Row._fields)
            rows = Row(*(np.concatenate(column) for column in columns))
            self.pending = Pending(rows, self.together.put(rows.frames))
        return [
            _environment(environment, snapshot, seat, on_step, say)
            for environment, snapshot, seat in zip(environments, snapshots, self.seats, strict=True)
        ]

    def _restore_device(self, snapshots: Sequence[Snapshot]) -> None:
        acting, sums = [], []
        template = self.together.agent(self.acting, 0)
        for index, snapshot in enumerate(snapshots):
            with jax.default_device(self.together.device(index)):
                acting.append(arrays.from_host(template, snapshot.device, "acting/"))
                sums.append(MeanMetrics.saved(snapshot.device, "metrics/"))
        self.acting = self.together.stack(acting)
        self.metrics.sums = None if sums[0] is None else self.together.stack(sums)
        self.metrics.count = snapshots[0].header["metrics_count"]


def _environment(
    environment: Env, snapshot: Snapshot, seat: Seat, on_step: Callable[[int, int], None], say: Say
) -> Observation:
    try:
        if "environment" not in snapshot.host:
            raise StateMismatch("it was not saved")
        return attempt(environment.set_state, snapshot.host["environment"].tobytes(), on_step=on_step)
    except StateMismatch as error:
        say(
            f"the emulator cannot be brought back to where it was ({error}); the running episode is cut off there "
            f"as truncated, and a new one begins"
        )
    # The next row says `first`, and the last one stored is no terminal: that is what a truncation looks like.
    seat.episode_return, seat.episode_length = 0.0, 0
    return attempt(environment.reset)
