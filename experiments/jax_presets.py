"""Settings of `experiments.jax_env`: presets, flags, and the sizes that follow from the environment."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

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
from drama_jax.envs import jax_env
from experiments import command_line, run_options

PROGRAM = "python -m experiments.jax_env"
_MOST_SEEDS = 1024
_DESCRIPTION = """Trains Drama on an environment written in JAX, several seeds at once, all of it on the device.

Every other setting has a dotted flag, applied over the preset, for example
--agent.replay.sampler uniform, --agent.behaviour.name ppo, --agent.world-model.backbone.name gru.
--help-all lists them with the chosen preset's values."""


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


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that most runs need."""

    env: str
    """Environment of gymnax, for example Catch-bsuite or Breakout-MinAtar, or MODULE:CLASS with gymnax's interface."""
    preset: Literal["tiny", "minatar", "vector", "small", "xs"]
    """tiny: learns Catch in minutes on a laptop CPU. minatar: MinAtar's games on a CPU. vector: of tiny's size, the
    default where observations are vectors. small: between tiny and xs, for MinAtar on a GPU. xs: the paper's model of
    7 M parameters, 64 x 64 pixels. Other images are as small as the environment allows."""
    steps: int
    """Agent steps to train for."""
    seed: int
    """The first seed."""
    seeds: int
    """Agents to train in one program, of seeds SEED, SEED + 1, ...; each has its own run directory."""
    devices: int | None
    """GPUs of this machine to share the agents out to; as many as divide their number if not given."""
    logdir: pathlib.Path
    """Runs go to LOGDIR/ENV/PRESET/seedK-TIME."""
    picture: pathlib.Path | None
    """PNG of the learning curves of all seeds (needs matplotlib)."""
    data: pathlib.Path | None
    """JSON of the same."""
    random_episodes: int
    """Whole episodes of uniformly random actions that each seed is compared with; 0 for none."""
    compilation_cache: pathlib.Path | None
    """Where compiled programs are kept for the next run; None to keep none."""
    resume: bool
    """Continue the newest unfinished runs of this environment, preset and seeds; --no-resume starts new ones."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Options):
    """The flags that most runs need, and every other field."""

    agent: AgentConfig
    logging: LoggingConfig
    max_skipped_updates: int
    """Stop after so many updates in a row whose loss or gradient was not finite; each is skipped and counted."""


def parse(arguments: Sequence[str] | None) -> tuple[AllOptions, InGraphConfig, jax_env.JaxEnv]:
    """The options, the resolved configuration of the first seed, and the environment.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help or --help-all.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    preset = command_line.chosen(arguments, "preset", "tiny", tuple(PRESETS))
    base = PRESETS[preset]()
    for flag, kind in {"--help-all": AllOptions, "--help": Options, "-h": Options}.items():
        if flag in arguments:
            command_line.parse_plain(kind, ["--help"], PROGRAM, _DESCRIPTION, _defaults(kind, preset, base))
    name = _env(arguments)
    try:
        env, params = jax_env.load(name)
        shape = jax_env.observation_shape(env, params)
    except ConfigError as error:
        raise ConfigError(f"--env: {error}") from None
    if len(shape) == 1 and command_line.given(arguments, "preset") is None:
        preset, base = "vector", PRESETS["vector"]()
    base = dataclasses.replace(base, env=name, agent=fitted(base.agent, shape))
    options = command_line.parse_plain(AllOptions, arguments, PROGRAM, None, _defaults(AllOptions, preset, base))
    if not 1 <= options.seeds <= _MOST_SEEDS:
        raise ConfigError(f"--seeds must be an integer from 1 to {_MOST_SEEDS}, got {options.seeds}")
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(InGraphConfig)}
    try:
        config = InGraphConfig(**fields)
        shown = jax_env.JaxEnv(env, params, config.agent.world_model.autoencoder.image_size)
    except ConfigError as error:
        message = command_line.with_flags(str(error))
        raise ConfigError(message if message.startswith("--") else f"--env: {message}") from None
    _check_observations(name, config.agent.world_model.autoencoder, shape)
    return options, config, shown


def _check_observations(name: str, autoencoder: AutoencoderConfig, shape: tuple[int, ...]) -> None:
    """Raises a ConfigError if flags ask for another kind of observation than the environment's."""
    size = shape[0] if len(shape) == 1 else 0
    if autoencoder.vector_size != size:
        raise ConfigError(
            f"--agent.world-model.autoencoder.vector-size must be {size} for {name}, got {autoencoder.vector_size}"
        )
    if len(shape) == 3 and autoencoder.image_channels != shape[2]:
        raise ConfigError(
            f"--agent.world-model.autoencoder.image-channels must be {shape[2]} for {name}, got "
            f"{autoencoder.image_channels}"
        )


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


def _env(arguments: Sequence[str]) -> str:
    """What --env is given, because it decides the defaults of others."""
    name = command_line.given(arguments, "env")
    if name is None:
        raise ConfigError("--env is missing; name a JAX environment, for example --env Catch-bsuite")
    return name


def _defaults(kind: type[Any], preset: str, base: InGraphConfig) -> Any:
    """The preset's values, as the defaults of the flags."""
    return run_options.filled(kind, base, env=base.env, preset=preset, picture=None, data=None, random_episodes=100)
