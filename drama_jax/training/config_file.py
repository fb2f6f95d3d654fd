"""config.json of a run directory: what the run was started with, as it is stored and as a configuration."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import flax.traverse_util

from drama_jax.config import AgentConfig, ConfigError, RunConfig, TaskRunConfig

NAME = "config.json"
LATER = {
    "agent/world_model/autoencoder/reconstruction": "squared_error",
    "agent/world_model/autoencoder/vector_size": 0,
    "agent/world_model/autoencoder/vector_layers": 3,
    "agent/world_model/autoencoder/vector_units": 256,
    "agent/world_model/backbone/mixer_width": 0,
    "agent/world_model/backbone/feedforward_width": 0,
    "agent/world_model/backbone/max_length": 128,
    "agent/world_model/backbone/dropout": 0.0,
    "agent/world_model/backbone/attention_dropout": 0.0,
    "agent/imagination/draw_terminations": False,
    "agent/behaviour/name": "actor_critic",
    "agent/behaviour/epochs": 3,
    "agent/behaviour/minibatch_size": 16_384,
    "agent/behaviour/clip_ratio": 0.2,
    "agent/fidelity/gradient_through_clip": True,
    "agent/world_model/free_bits_each": False,
    "agent/warmup_repeats": 0.0,
}
"""Fields that run directories of older versions lack, and what those versions did."""


class RunSettings(Protocol):
    """A configuration of any kind of run: a dataclass that has at least these fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def agent(self) -> AgentConfig:
        """What is trained."""
        ...

    @property
    def steps(self) -> int:
        """Agent steps to train for."""
        ...

    @property
    def seed(self) -> int:
        """Of everything random."""
        ...


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a configuration by path of the field, as they are once written to a file and read."""
    # Through JSON, where tuples become lists and numbers what they will be when they are read.
    leaves: dict[str, Any] = flax.traverse_util.flatten_dict(json.loads(json.dumps(content)), sep="/")
    return leaves


def read(directory: pathlib.Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      ConfigError: it cannot be read, or misses something.
    """
    path = directory / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict) or not isinstance(content["id"], str):
            raise TypeError("config or id is of the wrong type")
        if not isinstance(content["game"], str) or not isinstance(content["preset"], str):
            raise TypeError("game or preset is of the wrong type")
        if not isinstance(content.get("continued", []), list):
            raise TypeError("continued is of the wrong type")
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} was not written by this version of drama_jax ({type(error).__name__}: {error}); --no-resume "
            f"starts a new run"
        ) from error
    return dict(content)


def load_config(directory: pathlib.Path) -> tuple[str, RunConfig]:
    """The game and the resolved configuration of a run of Atari, from its config.json; see `load_any_config`.

    Raises:
      ConfigError: likewise, or it is a run of something else.
    """
    game, config = load_any_config(directory)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{directory} is a run of {game}; this is for runs of Atari")
    return game, config


def load_any_config(directory: pathlib.Path) -> tuple[str, RunConfig | TaskRunConfig]:
    """The game, or task of EnvPool, and the resolved configuration of a run, from its config.json.

    Raises:
      ConfigError: if `directory` is no run directory, or its configuration is not one that this version knows.
    """
    path = directory / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        game, values = content["game"], content["config"]
        if not isinstance(game, str):
            raise TypeError(f"game is {game!r}")
        kind = TaskRunConfig if isinstance(values, dict) and "task" in values else RunConfig
        return game, _from_dict(kind, values)
    except OSError as error:
        raise ConfigError(f"{directory} is no run directory: cannot read {path} ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ConfigError) else error
        raise ConfigError(f"{path} was not written by this version of drama_jax ({reason})") from error


def _from_dict(kind: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """The inverse of `dataclasses.asdict` after a trip through JSON, where tuples have become lists.

    `path` is where `values` lie in the run's configuration. Fields that are missing must be in `LATER`.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is {str(values)[:40]!r}")
    types = typing.get_type_hints(kind)
    values = {name: LATER[path + name] for name in types if path + name in LATER} | values
    if different := types.keys() ^ values.keys():
        raise KeyError(f"{kind.__name__}: {', '.join(sorted(map(str, different)))}")

    def build(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(types[name]):
            return _from_dict(types[name], value, f"{path}{name}/")
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: build(name, value) for name, value in values.items()})
