"""A training run: its agent, its environment, its evaluation, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drama_jax.config.agent import AgentConfig
from drama_jax.config.validation import at_most, check_types, fraction, not_negative, positive, require


@dataclass(frozen=True)
class AtariConfig:
    """The Atari environment; the defaults are the paper's."""

    backend: Literal["envpool", "ale"] = "envpool"
    frame_skip: int = 4
    """Emulator frames per agent step."""
    sticky_actions: float = 0.0
    """Probability of repeating the previous action, per emulator frame."""
    noop_max: int = 0
    """Most random no-op frames at a reset; EnvPool always plays at least one."""
    full_action_space: bool = False
    max_episode_steps: int = 27_000
    """Agent steps after which an episode is truncated (27,000 steps = 108,000 frames)."""
    life_loss_is_terminal: bool = True
    """A lost life is stored as a terminal; the episode goes on."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "frame_skip", "max_episode_steps")
        fraction(self, "sticky_actions")
        not_negative(self, "noop_max")


@dataclass(frozen=True)
class TaskConfig:
    """An environment of EnvPool that is not Atari."""

    max_episode_steps: int = 0
    """Agent steps after which an episode is truncated; 0 for the task's own number."""

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "max_episode_steps")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation after training."""

    episodes: int = 100
    """Episodes played to their end; 0 skips evaluation."""
    num_envs: int = 20
    """Parallel environments; each plays the same number of episodes (+-1), so short episodes are not favoured."""
    max_episode_steps: int = 27_000

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "episodes")
        positive(self, "num_envs", "max_episode_steps")
        at_most(self, 4096, "num_envs")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written to the run directory, and how often (in agent steps)."""

    metrics_every: int = 100
    images_every: int = 5_000
    checkpoint_every: int = 10_000
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "metrics_every", "images_every", "checkpoint_every")


@dataclass(frozen=True)
class AnyRunConfig:
    """One training run, whatever its environment."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    steps: int = 100_000
    """Agent steps (of Atari, 100,000 steps = 400,000 frames)."""
    max_skipped_updates: int = 50
    """Updates in a row that may be skipped because loss or gradient was not finite before the run stops."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.steps >= 0, f"steps must be >= 0, got {self.steps}")
        positive(self, "max_skipped_updates")
        # Environments add small numbers to it, for int32 seeds of their own.
        require(0 <= self.seed <= 2_000_000_000, f"seed must lie in [0, 2000000000], got {self.seed}")


@dataclass(frozen=True)
class RunConfig(AnyRunConfig):
    """One training run on Atari."""

    atari: AtariConfig = field(default_factory=AtariConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.agent.world_model.autoencoder.image_channels == 3,
            f"agent.world_model.autoencoder.image_channels must be 3 for Atari, got "
            f"{self.agent.world_model.autoencoder.image_channels}",
        )
        require(
            self.agent.world_model.autoencoder.vector_size == 0,
            f"agent.world_model.autoencoder.vector_size must be 0 for Atari, which shows images, got "
            f"{self.agent.world_model.autoencoder.vector_size}",
        )


@dataclass(frozen=True)
class TaskRunConfig(AnyRunConfig):
    """One training run on an environment of EnvPool that is not Atari."""

    task: TaskConfig = field(default_factory=TaskConfig)
