"""The agent: its parts, and what they ask of each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from drama_jax.config.behaviour import BehaviourConfig, ImaginationConfig
from drama_jax.config.fidelity import Fidelity
from drama_jax.config.learning import ComputeDtype
from drama_jax.config.replay import ReplayConfig
from drama_jax.config.validation import check_types, not_negative, positive, require
from drama_jax.config.world_model import WorldModelConfig


@dataclass(frozen=True)
class AgentConfig:
    """Everything `agent.init`, `agent.act` and `agent.update` depend on."""

    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    fidelity: Fidelity = field(default_factory=Fidelity)
    acting_context: int = 16
    """Past steps of the episode that the policy's state is computed from."""
    warmup_steps: int = 1032
    """Random steps before the first update."""
    warmup_repeats: float = 0.0
    """0: each of them is uniformly random. Otherwise a random action is kept up for a random number of steps, of
    probability n^-warmup_repeats (`drama_jax.exploration`), for games that single random steps do not get through."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "acting_context")
        not_negative(self, "warmup_steps", "warmup_repeats")
        # The first update runs once warmup_steps + 1 transitions are stored.
        stored = self.warmup_steps + 1
        wm, im = self.world_model, self.imagination
        require(
            self.replay.capacity >= stored,
            f"ReplayConfig.capacity must hold the {stored} steps before the first update, got {self.replay.capacity}",
        )
        for name, batch, length in (
            ("world_model", wm.batch_size, wm.batch_length),
            ("imagination", im.batch_size, im.context_length),
        ):
            starts = stored + 1 - length
            require(
                starts >= batch,
                f"AgentConfig.{name}: a batch of {batch} windows of {length} steps does not fit into {stored} stored "
                f"steps ({max(starts, 0)} starts); lower the batch or raise warmup_steps to {batch + length - 2}",
            )
        wm.check_length("AgentConfig.acting_context", self.acting_context)
        wm.check_length("ImaginationConfig: context_length + horizon", im.context_length + im.horizon)

    def with_compute_dtype(self, dtype: ComputeDtype) -> AgentConfig:
        """The same configuration with both `compute_dtype` fields set."""
        return dataclasses.replace(
            self,
            world_model=dataclasses.replace(self.world_model, compute_dtype=dtype),
            behaviour=dataclasses.replace(self.behaviour, compute_dtype=dtype),
        )
