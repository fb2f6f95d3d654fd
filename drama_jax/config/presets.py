"""The named presets, and the sizes of other backbones."""

from __future__ import annotations

import dataclasses

from drama_jax.config.agent import AgentConfig
from drama_jax.config.autoencoder import AutoencoderConfig
from drama_jax.config.backbone import BackboneConfig, BackboneName
from drama_jax.config.behaviour import BehaviourConfig, BehaviourName, ImaginationConfig
from drama_jax.config.fidelity import Fidelity
from drama_jax.config.learning import OptimizerConfig
from drama_jax.config.replay import ReplayConfig
from drama_jax.config.run import AtariConfig, EvaluationConfig, LoggingConfig, RunConfig
from drama_jax.config.validation import ConfigError
from drama_jax.config.world_model import WorldModelConfig


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


def backbone_sizes(name: BackboneName, width: int) -> dict[str, int]:
    """The fields of `BackboneConfig` with which a backbone has as many parameters as `mamba2` (to 5 %).

    Args:
      name: of the backbone.
      width: of both; empty for one whose sizes are not known.
    """
    return dict(_MATCHED.get(width, {}).get(name, {}))


def with_backbone(config: RunConfig, name: BackboneName) -> RunConfig:
    """A preset with another sequence model than `mamba2`, of a size with as many parameters (to 5 %).

    Where the preset does what the released code does, the transformer is the released variant instead, a third larger
    than `mamba2`, with its dropout.

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
        old = dataclasses.replace(old, dropout=0.1, attention_dropout=0.1)
    elif old.name == "mamba2" and old.width in _MATCHED:
        sizes = backbone_sizes(name, old.width)
    else:
        raise ConfigError(
            f"backbone: no size of {name!r} is known for a {old.name!r} of width {old.width}; accepted: a 'mamba2' of "
            f"width {' or '.join(map(str, _MATCHED))}"
        )
    backbone = dataclasses.replace(old, name=name, **sizes)
    world_model = dataclasses.replace(model, backbone=backbone)
    return dataclasses.replace(config, agent=dataclasses.replace(agent, world_model=world_model, fidelity=fidelity))
