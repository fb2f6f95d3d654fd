"""Paper or released code, where the two differ."""

from __future__ import annotations

from dataclasses import dataclass

from drama_jax.config.validation import check_types


@dataclass(frozen=True)
class Fidelity:
    """Where the paper's equations (the defaults) and the released PyTorch code part ways.

    Each field is read at exactly one place. Preset `reference` inverts all of them, and
    `WorldModelConfig.free_bits_each` with them.
    """

    reset_at_episode_start: bool = True
    """Drop the recurrent state where an episode starts; the released code lets it run on."""
    reward_follows_action: bool = True
    """Imagined reward and termination are those caused by the action; the released code reads them one step early."""
    bootstrap_next_value: bool = True
    """The lambda-return mixes in V_(t+1), as defined; the released code mixes in V_t."""
    weight_by_survival: bool = True
    """Imagined steps after a predicted termination do not count; in the released code they do."""
    normalise_by_training_data: bool = True
    """The actor's input statistics move in behaviour training only; the released code moves them at every call."""
    first_action_from_policy: bool = True
    """The policy chooses an episode's first action too; in the released code it is uniformly random."""
    gradient_through_clip: bool = True
    """PPO's clip passes the gradient where it does not bind; the released code cuts it off and keeps half of it."""

    def __post_init__(self) -> None:
        check_types(self)
