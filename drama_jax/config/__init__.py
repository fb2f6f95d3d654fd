"""Configuration: frozen, hashable, validated dataclasses and the named presets.

Every dataclass here is static: it is passed to pure functions as a Python value and becomes part of the
`jax.jit` cache key. The defaults are preset `xs`, the 7 M-parameter model of Drama (arXiv 2410.08893).

*Steps* are agent steps, *frames* are emulator frames; one Atari step is four frames.

Of the modules, each imports only those before it: `validation`; `fidelity`, `learning`, `autoencoder`, `backbone`,
`replay`; `world_model`, `behaviour`; `agent`; `run`; `presets`.
"""

from drama_jax.config.agent import AgentConfig
from drama_jax.config.autoencoder import AutoencoderConfig
from drama_jax.config.backbone import BackboneConfig, BackboneName
from drama_jax.config.behaviour import BehaviourConfig, BehaviourName, ImaginationConfig
from drama_jax.config.fidelity import Fidelity
from drama_jax.config.learning import ComputeDtype, OptimizerConfig
from drama_jax.config.presets import PRESETS, backbone_sizes, preset, with_backbone
from drama_jax.config.replay import ReplayConfig, Sampler
from drama_jax.config.run import (
    AnyRunConfig,
    AtariConfig,
    EvaluationConfig,
    LoggingConfig,
    RunConfig,
    TaskConfig,
    TaskRunConfig,
)
from drama_jax.config.validation import ConfigError
from drama_jax.config.world_model import WorldModelConfig

__all__ = [
    "PRESETS",
    "AgentConfig",
    "AnyRunConfig",
    "AtariConfig",
    "AutoencoderConfig",
    "BackboneConfig",
    "BackboneName",
    "BehaviourConfig",
    "BehaviourName",
    "ComputeDtype",
    "ConfigError",
    "EvaluationConfig",
    "Fidelity",
    "ImaginationConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "ReplayConfig",
    "RunConfig",
    "Sampler",
    "TaskConfig",
    "TaskRunConfig",
    "WorldModelConfig",
    "backbone_sizes",
    "preset",
    "with_backbone",
]
