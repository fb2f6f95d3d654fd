"""Settings of `experiments.jax_env`: presets, and the sizes that follow from the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from drama_jax.config import (
    AgentConfig,
    AutoencoderConfig,
    BackboneConfig,
    BehaviourConfig,
    ConfigError,
    ImaginationConfig,
    OptimizerConfig,
    ReplayConfig,
    WorldModelConfig,
)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written to the run directory, and how often (in agent steps)."""

    metrics_every: int = 100
    """Steps that the device takes without the host: metrics are their means."""
    checkpoint_every: int = 10_000
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        _positive("logging", metrics_every=self.metrics_every, checkpoint_every=self.checkpoint_every)


@dataclasses.dataclass(frozen=True)
class InGraphConfig:
    """One training run of one seed, as it is kept in config.json."""

    env: str
    """The environment, see `drama_jax.envs.jax_env.load`."""
    agent: AgentConfig
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    steps: int = 8_000
    """Agent steps."""
    max_skipped_updates: int = 50
    """Updates in a row that may be skipped because loss or gradient was not finite before the run stops."""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("", steps=self.steps, max_skipped_updates=self.max_skipped_updates)
        if not 0 <= self.seed <= 2_000_000_000:
            raise ConfigError(f"--seed must lie in [0, 2000000000], got {self.seed}")


def _positive(group: str, **values: int) -> None:
    for name, value in values.items():
        if not 0 < value < 2**31:
            flag = ".".join(filter(None, (group, name.replace("_", "-"))))
            raise ConfigError(f"--{flag} must be an integer from 1 to {2**31 - 1}, got {value}")


def _tiny() -> InGraphConfig:
    agent = AgentConfig(
        world_model=WorldModelConfig(
            autoencoder=AutoencoderConfig(image_size=10, image_channels=1, depths=(8, 16), categoricals=8, classes=8),
            backbone=BackboneConfig(width=64, num_layers=1, head_dim=32, chunk_size=32),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=50),
            head_units=64,
            num_bins=63,
            batch_size=4,
            batch_length=18,
            free_bits=0.3,
            # As in the runs that were made with it; so low a threshold of the mean is seldom reached.
            free_bits_each=False,
        ),
        imagination=ImaginationConfig(batch_size=48, context_length=2, horizon=9, unroll=1),
        behaviour=BehaviourConfig(
            actor_layers=1,
            actor_units=64,
            critic_layers=1,
            critic_units=64,
            num_bins=63,
            entropy_scale=1e-2,
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_updates=50, max_grad_norm=100.0),
        ),
        replay=ReplayConfig(capacity=10_000),
        acting_context=9,
        warmup_steps=200,
    )
    return InGraphConfig("Catch-bsuite", agent)


def _minatar() -> InGraphConfig:
    """`tiny` for boards of which any cell may be on, at twice its time a step; what differs has its reason here."""
    tiny = _tiny()
    model = dataclasses.replace(
        tiny.agent.world_model,
        autoencoder=dataclasses.replace(
            tiny.agent.world_model.autoencoder,
            # A bullet of Space Invaders is one cell of 600: `tiny` reconstructs none after 4,000 updates, and what the
            # model does not see the policy cannot evade.
            reconstruction="cross_entropy",
            # 96 bits; the 24 of `tiny` are spent on the aliens.
            categoricals=32,
            classes=8,
        ),
        # With 1e-3 single cells are learnt later, in half as many updates again.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_updates=50),
        head_units=128,
        # More frames an update, for the autoencoder.
        batch_size=8,
        batch_length=16,
        # Most steps of a board are easy to predict, and would take the gradient from the others.
        free_bits_each=True,
    )
    agent = dataclasses.replace(
        tiny.agent,
        world_model=model,
        # Context to see which way things move; the policy has to meet the deaths that the model is not sure of.
        imagination=dataclasses.replace(tiny.agent.imagination, context_length=4, horizon=10, draw_terminations=True),
        behaviour=dataclasses.replace(tiny.agent.behaviour, actor_units=128, critic_units=128, entropy_scale=3e-3),
    )
    return dataclasses.replace(tiny, env="SpaceInvaders-MinAtar", agent=agent)


def _vector() -> InGraphConfig:
    tiny = _tiny()
    model = dataclasses.replace(
        tiny.agent.world_model,
        autoencoder=dataclasses.replace(
            tiny.agent.world_model.autoencoder, categoricals=16, classes=8, vector_layers=2, vector_units=64
        ),
        batch_size=4,
        batch_length=32,
        # What is below the threshold learns nothing, and the divergence of so small a latent is below 1 nat soon.
        free_bits=0.1,
    )
    imagination = ImaginationConfig(batch_size=48, context_length=4, horizon=15, unroll=1)
    agent = dataclasses.replace(
        tiny.agent,
        world_model=model,
        imagination=imagination,
        # With `tiny`'s 1e-2 CartPole is learnt and lost again, and Pendulum less well.
        behaviour=dataclasses.replace(tiny.agent.behaviour, entropy_scale=1e-3),
        acting_context=16,
        warmup_steps=500,
    )
    return dataclasses.replace(tiny, env="Pendulum-v1", agent=agent)


def _small() -> InGraphConfig:
    agent = AgentConfig(
        world_model=WorldModelConfig(
            autoencoder=AutoencoderConfig(
                image_size=12, image_channels=4, depths=(32, 64, 64), categoricals=16, classes=16
            ),
            backbone=BackboneConfig(width=256),
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_updates=500),
            batch_size=16,
            batch_length=64,
        ),
        imagination=ImaginationConfig(batch_size=256, context_length=8, horizon=15),
        behaviour=BehaviourConfig(
            actor_layers=2,
            critic_layers=2,
            critic_units=256,
            entropy_scale=1e-3,
            optimizer=OptimizerConfig(learning_rate=1e-4, warmup_updates=500, max_grad_norm=100.0),
        ),
    )
    return InGraphConfig("Breakout-MinAtar", agent, LoggingConfig(metrics_every=500), steps=100_000)


def _xs() -> InGraphConfig:
    return InGraphConfig("Breakout-MinAtar", AgentConfig(), LoggingConfig(metrics_every=500), steps=100_000)


PRESETS: Mapping[str, Callable[[], InGraphConfig]] = {
    "tiny": _tiny,
    "minatar": _minatar,
    "vector": _vector,
    "small": _small,
    "xs": _xs,
}


def fitted(agent: AgentConfig, shape: tuple[int, ...]) -> AgentConfig:
    """The agent for an environment's boards [rows, columns, channels], or vectors [O].

    An image of fewer than 64 pixels becomes the smallest that the board fits into and that the autoencoder can halve.
    """
    autoencoder = agent.world_model.autoencoder
    if len(shape) == 1:
        autoencoder = dataclasses.replace(autoencoder, vector_size=shape[0], reconstruction="squared_error")
    else:
        factor = 2 ** (len(autoencoder.depths) - 1)
        least = -(-max(shape[:2]) // factor) * factor
        size = least if autoencoder.image_size < 64 else max(autoencoder.image_size, least)
        autoencoder = dataclasses.replace(autoencoder, image_size=size, image_channels=shape[2])
    return dataclasses.replace(agent, world_model=dataclasses.replace(agent.world_model, autoencoder=autoencoder))
