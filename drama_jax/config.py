"""Configuration: frozen, hashable, validated dataclasses and the named presets.

Every dataclass here is static: it is passed to pure functions as a Python value and becomes part of the
`jax.jit` cache key. The defaults are preset `xs`, the 7 M-parameter model of Drama (arXiv 2410.08893).

*Steps* are agent steps, *frames* are emulator frames; one Atari step is four frames.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

ComputeDtype = Literal["auto", "float32", "bfloat16", "float64"]
Sampler = Literal["dfs", "uniform"]
BackboneName = Literal["mamba2", "mamba", "gru", "transformer", "rwkv"]
BehaviourName = Literal["actor_critic", "ppo"]
_LARGEST = 2**31 - 1  # steps, slots and seeds are int32
_MOST_LAYERS = 100  # each is compiled on its own


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line naming the field, what was given and what is accepted."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_types(config: Any) -> None:
    """Every field is of the type it is declared with, and every number finite; the first check of a `__post_init__`."""
    for name, wanted in typing.get_type_hints(type(config)).items():
        problem = _type_problem(wanted, getattr(config, name))
        if problem:
            given = " ".join(repr(getattr(config, name)).split())
            raise ConfigError(f"{type(config).__name__}.{name} must be {problem}, got {given[:100]}")


def _type_problem(wanted: Any, value: object) -> str | None:
    """What a value should have been, as the rest of a sentence; None if it is that."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        # In this order: what is no string may not be hashable or comparable.
        return None if isinstance(value, str) and value in arguments else f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        numbers = "integers" if arguments[0] is int else "finite numbers"
        if not isinstance(value, tuple) or any(_type_problem(arguments[0], entry) for entry in value):
            return f"a tuple of {numbers}"
        return None if arguments[1] is ... or len(value) == len(arguments) else f"a tuple of {len(arguments)} {numbers}"
    if wanted is bool:
        return None if isinstance(value, bool) else "True or False"
    if wanted is int:
        fine = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
        return None if fine else f"an integer of at most {_LARGEST}"
    if wanted is float:
        # Finite in float32 as well; false for NaN.
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 3e38
        return None if fine else "a finite number"
    return None if isinstance(value, wanted) else f"of type {wanted.__name__}"


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} must be positive, got {value}")


def _at_most(config: object, most: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value <= most, f"{type(config).__name__}.{name} must be at most {most}, got {value}")


def _fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{type(config).__name__}.{name} must lie in [0, 1], got {value}")


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
        _check_types(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """LaProp with linear warm-up and global-norm clipping (paper, appendix on hyper-parameters)."""

    learning_rate: float = 4e-5
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-20
    weight_decay: float = 0.0
    """Decoupled decay per update, not multiplied by the learning rate."""
    warmup_updates: int = 1000
    max_grad_norm: float = 1000.0

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "learning_rate", "eps", "max_grad_norm")
        _fraction(self, "weight_decay")
        _require(0 <= self.b1 < 1, f"OptimizerConfig.b1 must lie in [0, 1), got {self.b1}")
        _require(0 < self.b2 < 1, f"OptimizerConfig.b2 must lie in (0, 1), got {self.b2}")
        _require(self.warmup_updates >= 0, f"OptimizerConfig.warmup_updates must be >= 0, got {self.warmup_updates}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The discrete variational autoencoder: frame <-> K categoricals of C classes.

    A frame is an image, or, where `vector_size` is not 0, a vector.
    """

    image_size: int = 64
    """Height and width of a frame in pixels."""
    image_channels: int = 3
    depths: tuple[int, ...] = (16, 32, 48, 64, 64)
    """Channels of each 5x5 convolution; the first has stride 1, every other one stride 2."""
    categoricals: int = 32
    classes: int = 32
    unimix: float = 0.01
    """Share of the uniform distribution mixed into every categorical."""
    vector_size: int = 0
    """Numbers of a vector observation, which is then seen in place of an image; 0 for images."""
    vector_layers: int = 3
    """Hidden layers of a vector's encoder, and of its decoder."""
    vector_units: int = 256

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "image_size", "image_channels", "categoricals", "classes", "vector_layers", "vector_units")
        _at_most(self, _MOST_LAYERS, "vector_layers")
        _require(self.vector_size >= 0, f"AutoencoderConfig.vector_size must be >= 0, got {self.vector_size}")
        _fraction(self, "unimix")
        _require(len(self.depths) >= 2, f"AutoencoderConfig.depths needs at least two entries, got {self.depths}")
        _require(min(self.depths) > 0, f"AutoencoderConfig.depths must be positive, got {self.depths}")
        size = self.latent_size
        _require(size <= _LARGEST, f"AutoencoderConfig.categoricals * classes must be <= {_LARGEST}, got {size}")
        _require(len(self.depths) <= 16, f"AutoencoderConfig.depths needs at most 16 entries, got {len(self.depths)}")
        factor = 2 ** (len(self.depths) - 1)
        _require(
            self.image_size % factor == 0,
            f"AutoencoderConfig.image_size must be a multiple of {factor} for {len(self.depths)} depths, "
            f"got {self.image_size}",
        )

    @property
    def latent_size(self) -> int:
        """S = K * C, the width of the flattened latent."""
        return self.categoricals * self.classes

    @property
    def map_size(self) -> int:
        """Height and width of the encoder's last feature map."""
        return int(self.image_size // 2 ** (len(self.depths) - 1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a frame."""
        return (self.image_size, self.image_size, self.image_channels)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of an observation: (height, width, channels) of an image, or (entries,) of a vector."""
        return (self.vector_size,) if self.vector_size else self.image_shape

    @property
    def frame_dtype(self) -> Literal["uint8", "float32"]:
        """Type of an observation: uint8 of an image, float32 of a vector."""
        return "float32" if self.vector_size else "uint8"

    @property
    def embedding_size(self) -> int:
        """E, the features that the encoder makes of an observation."""
        return self.vector_units if self.vector_size else self.map_size**2 * self.depths[-1]


@dataclass(frozen=True)
class BackboneConfig:
    """The sequence model (z_t, a_t) -> d_t."""

    name: BackboneName = "mamba2"
    """Each backbone reads the fields that name it, and `width` and `num_layers`."""
    width: int = 512
    """D, the width of the residual stream and of the output d_t."""
    num_layers: int = 2
    expand: int = 2
    """Inner width of a block of `mamba2` or `mamba` is expand * width."""
    head_dim: int = 64
    """P, the width of one head of `mamba2`, `transformer` or `rwkv`."""
    state_dim: int = 16
    """N, the state dimension of `mamba2` and `mamba`."""
    conv_width: int = 4
    """Steps that the convolution of `mamba2` and `mamba` sees."""
    chunk_size: int = 64
    """Q, the steps that the scan of `mamba2`, `mamba` or `rwkv` takes at once."""
    mixer_width: int = 0
    """Width of keys and values (`transformer`, `rwkv`) or of the hidden state (`gru`); 0 stands for width."""
    feedforward_width: int = 0
    """Hidden width of the feed-forward part (`transformer`, `rwkv`); 0 stands for expand * width."""
    max_length: int = 128
    """Steps of one segment that `transformer` has positions for."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "width", "num_layers", "expand", "head_dim", "state_dim", "conv_width", "chunk_size")
        _positive(self, "max_length")
        _at_most(self, _MOST_LAYERS, "num_layers", "conv_width")
        for name in ("mixer_width", "feedforward_width"):
            _require(getattr(self, name) >= 0, f"BackboneConfig.{name} must be >= 0, got {getattr(self, name)}")
        _require(
            self.inner_width <= _LARGEST, f"BackboneConfig.width * expand must be <= {_LARGEST}, got {self.inner_width}"
        )
        if self.name == "mamba2":
            divided, size = "expand * width", self.inner_width
        elif self.name in ("transformer", "rwkv"):
            divided, size = "mixer_width" if self.mixer_width else "width", self.mixer_size
        else:
            return
        _require(
            size % self.head_dim == 0,
            f"BackboneConfig.head_dim must divide {divided} = {size}, got {self.head_dim}",
        )

    @property
    def inner_width(self) -> int:
        """Width of x and z inside a block: expand * D."""
        return self.expand * self.width

    @property
    def mixer_size(self) -> int:
        """Width of keys, values or hidden state, see `mixer_width`."""
        return self.mixer_width or self.width

    @property
    def feedforward_size(self) -> int:
        """Hidden width of the feed-forward part, see `feedforward_width`."""
        return self.feedforward_width or self.inner_width

    @property
    def num_heads(self) -> int:
        """H, the number of heads: of the SSD, or of `transformer` and `rwkv`."""
        return (self.inner_width if self.name == "mamba2" else self.mixer_size) // self.head_dim


@dataclass(frozen=True)
class WorldModelConfig:
    """World model: autoencoder, backbone, heads, loss and its optimiser."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    head_units: int = 256
    """Width of the one hidden layer in the reward and termination heads."""
    num_bins: int = 255
    """Bins of the symlog two-hot distributions."""
    batch_size: int = 16
    batch_length: int = 128
    """T, the steps of one training sequence."""
    free_bits: float = 1.0
    """Nats below which the KL, summed over the categoricals, is not penalised."""
    free_bits_each: bool = True
    """Compare each step's KL with `free_bits`. The released code (`reference`) compares their mean: once most steps are
    easy to predict it is lower, and no step has a gradient, however wrong."""
    dynamics_scale: float = 1.0
    representation_scale: float = 0.1
    compute_dtype: ComputeDtype = "auto"
    """Precision of convolutions and matrix products; `auto` is bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "head_units", "batch_size", "dynamics_scale")
        _require(self.num_bins >= 3, f"WorldModelConfig.num_bins must be at least 3, got {self.num_bins}")
        _require(self.batch_length >= 2, f"WorldModelConfig.batch_length must be at least 2, got {self.batch_length}")
        for name in ("free_bits", "representation_scale"):
            _require(getattr(self, name) >= 0, f"WorldModelConfig.{name} must be >= 0, got {getattr(self, name)}")
        self.check_length("WorldModelConfig.batch_length", self.batch_length)

    def check_length(self, name: str, steps: int) -> None:
        """Raises a ConfigError if the backbone cannot take sequences of `steps` steps, as the field `name` wants."""
        most = self.backbone.max_length
        _require(
            self.backbone.name != "transformer" or steps <= most,
            f"{name} must be at most backbone.max_length = {most} for a transformer, got {steps}",
        )

    @property
    def feature_size(self) -> int:
        """F = S + D, the width of the behaviour's input."""
        return self.autoencoder.latent_size + self.backbone.width


@dataclass(frozen=True)
class ImaginationConfig:
    """Rollouts inside the world model."""

    batch_size: int = 1024
    """Number of start points per update."""
    context_length: int = 8
    """Real steps that precede each imagined rollout."""
    horizon: int = 16
    unroll: int = 16
    """Imagined steps per iteration of the compiled loop; unrolled is faster on a GPU and slower to compile."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "batch_size", "context_length", "horizon", "unroll")


@dataclass(frozen=True)
class BehaviourConfig:
    """Actor and critic trained on imagined rollouts."""

    name: BehaviourName = "actor_critic"
    """How: one policy-gradient step on each batch of rollouts, or several clipped ones (`ppo`)."""
    actor_layers: int = 3
    actor_units: int = 256
    critic_layers: int = 3
    critic_units: int = 512
    num_bins: int = 255
    discount: float = 0.985
    lambda_: float = 0.95
    entropy_scale: float = 3e-4
    slow_critic_decay: float = 0.98
    return_scale_decay: float = 0.99
    return_percentiles: tuple[float, float] = (0.05, 0.95)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(max_grad_norm=100.0))
    compute_dtype: ComputeDtype = "auto"
    epochs: int = 3
    """Of `ppo`: passes over the rollouts per update."""
    minibatch_size: int = 16_384
    """Of `ppo`: imagined steps per gradient step."""
    clip_ratio: float = 0.2
    """Of `ppo`: how far the policy's probabilities may move from those sampled from, as a ratio, and still gain."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "actor_layers", "actor_units", "critic_layers", "critic_units")
        _positive(self, "epochs", "minibatch_size", "clip_ratio")
        _at_most(self, _MOST_LAYERS, "actor_layers", "critic_layers", "epochs")
        _fraction(self, "discount", "lambda_", "slow_critic_decay", "return_scale_decay")
        _require(self.num_bins >= 3, f"BehaviourConfig.num_bins must be at least 3, got {self.num_bins}")
        _require(self.entropy_scale >= 0, f"BehaviourConfig.entropy_scale must be >= 0, got {self.entropy_scale}")
        low, high = self.return_percentiles
        _require(
            0 < low < high < 1,
            f"BehaviourConfig.return_percentiles must satisfy 0 < low < high < 1, got {self.return_percentiles}",
        )


@dataclass(frozen=True)
class ReplayConfig:
    """Replay ring and its sampler."""

    capacity: int = 100_000
    """Steps the ring holds."""
    sampler: Sampler = "dfs"
    tau: float = 10.0
    """Temperature of world-model sampling."""
    imagination_tau: float = 10.0
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "capacity", "tau", "imagination_tau")
        for name in ("alpha", "beta"):
            _require(getattr(self, name) >= 0, f"ReplayConfig.{name} must be >= 0, got {getattr(self, name)}")


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
    """Uniformly random steps before the first update."""

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "acting_context")
        _require(self.warmup_steps >= 0, f"AgentConfig.warmup_steps must be >= 0, got {self.warmup_steps}")
        # The first update runs once warmup_steps + 1 transitions are stored.
        stored = self.warmup_steps + 1
        wm, im = self.world_model, self.imagination
        _require(
            self.replay.capacity >= stored,
            f"ReplayConfig.capacity must hold the {stored} steps before the first update, got {self.replay.capacity}",
        )
        for name, batch, length in (
            ("world_model", wm.batch_size, wm.batch_length),
            ("imagination", im.batch_size, im.context_length),
        ):
            starts = stored + 1 - length
            _require(
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
        _check_types(self)
        _positive(self, "frame_skip", "max_episode_steps")
        _fraction(self, "sticky_actions")
        _require(self.noop_max >= 0, f"AtariConfig.noop_max must be >= 0, got {self.noop_max}")


@dataclass(frozen=True)
class TaskConfig:
    """An environment of EnvPool that is not Atari."""

    max_episode_steps: int = 0
    """Agent steps after which an episode is truncated; 0 for the task's own number."""

    def __post_init__(self) -> None:
        _check_types(self)
        steps = self.max_episode_steps
        _require(steps >= 0, f"TaskConfig.max_episode_steps must be >= 0, got {steps}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation after training."""

    episodes: int = 100
    """Episodes played to their end; 0 skips evaluation."""
    num_envs: int = 20
    """Parallel environments; each plays the same number of episodes (+-1), so short episodes are not favoured."""
    max_episode_steps: int = 27_000

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.episodes >= 0, f"EvaluationConfig.episodes must be >= 0, got {self.episodes}")
        _positive(self, "num_envs", "max_episode_steps")
        _at_most(self, 4096, "num_envs")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written to the run directory, and how often (in agent steps)."""

    metrics_every: int = 100
    images_every: int = 5_000
    checkpoint_every: int = 10_000
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "metrics_every", "images_every", "checkpoint_every")


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
        _check_types(self)
        _require(self.steps >= 0, f"steps must be >= 0, got {self.steps}")
        _positive(self, "max_skipped_updates")
        # Environments add small numbers to it, for int32 seeds of their own.
        _require(0 <= self.seed <= 2_000_000_000, f"seed must lie in [0, 2000000000], got {self.seed}")


@dataclass(frozen=True)
class RunConfig(AnyRunConfig):
    """One training run on Atari."""

    atari: AtariConfig = field(default_factory=AtariConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.agent.world_model.autoencoder.image_channels == 3,
            f"agent.world_model.autoencoder.image_channels must be 3 for Atari, got "
            f"{self.agent.world_model.autoencoder.image_channels}",
        )
        _require(
            self.agent.world_model.autoencoder.vector_size == 0,
            f"agent.world_model.autoencoder.vector_size must be 0 for Atari, which shows images, got "
            f"{self.agent.world_model.autoencoder.vector_size}",
        )


@dataclass(frozen=True)
class TaskRunConfig(AnyRunConfig):
    """One training run on an environment of EnvPool that is not Atari."""

    task: TaskConfig = field(default_factory=TaskConfig)


def _tiny() -> RunConfig:
    # What the model must find is a paddle that makes up a fiftieth of the frame's rows. It finds it after some 2,500
    # updates, nearly whatever their batch: many updates on few frames cost least, and a higher learning rate drowns
    # the paddle in its own noise.
    # The gradient of the reconstruction shrinks a hundredfold in the first updates. With b2 = 0.999 LaProp would still
    # divide by those first gradients at the end of so short a run, and the model would never learn what moves.
    b2 = 0.95
    agent = AgentConfig(
        world_model=WorldModelConfig(
            autoencoder=AutoencoderConfig(image_size=32, depths=(4, 8, 16), categoricals=8, classes=8),
            backbone=BackboneConfig(width=64, head_dim=32, chunk_size=16),
            optimizer=OptimizerConfig(learning_rate=4e-4, b2=b2, warmup_updates=50),
            head_units=64,
            batch_size=3,
            batch_length=8,
        ),
        imagination=ImaginationConfig(batch_size=8, context_length=3, horizon=6),
        behaviour=BehaviourConfig(
            actor_layers=2,
            actor_units=64,
            critic_layers=2,
            critic_units=64,
            # Ten times the paper's, so that the policy still tries every action while the world model is poor.
            entropy_scale=3e-3,
            optimizer=OptimizerConfig(learning_rate=3e-4, b2=b2, max_grad_norm=100.0, warmup_updates=50),
        ),
        replay=ReplayConfig(capacity=10_000),
        acting_context=4,
        warmup_steps=200,
    )
    return RunConfig(
        agent=agent,
        atari=AtariConfig(max_episode_steps=1_000),
        evaluation=EvaluationConfig(episodes=10, num_envs=10, max_episode_steps=500),
        logging=LoggingConfig(metrics_every=50, images_every=2_000, checkpoint_every=2_000),
        steps=6_000,
    )


def _small() -> RunConfig:
    base = AgentConfig()
    autoencoder = AutoencoderConfig(depths=(32, 64, 96, 128, 128))
    return RunConfig(
        agent=dataclasses.replace(base, world_model=dataclasses.replace(base.world_model, autoencoder=autoencoder))
    )


def _reference() -> RunConfig:
    flipped = Fidelity(**{f.name: False for f in dataclasses.fields(Fidelity)})
    return RunConfig(agent=AgentConfig(fidelity=flipped, world_model=WorldModelConfig(free_bits_each=False)))


PRESETS = {"tiny": _tiny, "xs": RunConfig, "s": _small, "reference": _reference}

# By width: sizes with which the other backbones have the parameters of `mamba2`, to 5 %.
_MATCHED: dict[int, dict[str, dict[str, int]]] = {
    512: {
        "mamba": {"chunk_size": 32},
        "gru": {"mixer_width": 464},
        "transformer": {"feedforward_width": 384},
        "rwkv": {"mixer_width": 256, "feedforward_width": 576, "chunk_size": 16},
    },
    64: {
        "mamba": {"state_dim": 4},
        "gru": {"mixer_width": 62},
        "transformer": {"feedforward_width": 64, "max_length": 32},
        "rwkv": {"mixer_width": 32, "feedforward_width": 48},
    },
}


def preset(name: str, backbone: BackboneName | None = None, behaviour: BehaviourName | None = None) -> RunConfig:
    """The configuration called `name`.

    * `xs`: the paper's 7 M-parameter model with the paper's equations (default).
    * `reference`: the same sizes, with what the released PyTorch code does (`Fidelity`).
    * `s`: twice the autoencoder channels, the paper's remedy for lost small objects.
    * `tiny`: the same code at a size that a laptop CPU trains in minutes.

    Args:
      name: one of these.
      backbone: another sequence model than `mamba2`, of a size with as many parameters, see `with_backbone`.
      behaviour: another learner than `actor_critic`.

    Raises:
      ConfigError: if there is no such preset, backbone or behaviour.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; accepted: {', '.join(PRESETS)}")
    config = PRESETS[name]()
    if backbone is not None:
        config = with_backbone(config, backbone)
    if behaviour is not None:
        learner = dataclasses.replace(config.agent.behaviour, name=behaviour)
        config = dataclasses.replace(config, agent=dataclasses.replace(config.agent, behaviour=learner))
    return config


def with_backbone(config: RunConfig, name: BackboneName) -> RunConfig:
    """A preset with another sequence model than `mamba2`, of a size with as many parameters (to 5 %).

    Where the preset does what the released code does, the transformer is the released variant instead, a third larger
    than `mamba2`.

    Raises:
      ConfigError: if there is no such backbone, or no such size for the preset's width.
    """
    agent, model = config.agent, config.agent.world_model
    old, fidelity, sizes = model.backbone, agent.fidelity, {}
    if name == old.name:
        return config
    if name == "transformer" and not fidelity.reward_follows_action:
        # The released code reads rewards one step early with Mamba, and not with the transformer (Q2).
        fidelity = dataclasses.replace(fidelity, reward_follows_action=True)
    elif old.name == "mamba2" and old.width in _MATCHED:
        sizes = _MATCHED[old.width].get(name, {})
    else:
        raise ConfigError(
            f"backbone: no size of {name!r} is known for a {old.name!r} of width {old.width}; accepted: a 'mamba2' of "
            f"width {' or '.join(map(str, _MATCHED))}"
        )
    backbone = dataclasses.replace(old, name=name, **sizes)
    world_model = dataclasses.replace(model, backbone=backbone)
    return dataclasses.replace(config, agent=dataclasses.replace(agent, world_model=world_model, fidelity=fidelity))
