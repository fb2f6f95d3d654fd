"""The agents of a command: every seed with every value swept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from drama_jax.config import ConfigError
from drama_jax.training.config_file import RunSettings
from experiments.command_line import with_flags

Settings = TypeVar("Settings", bound=RunSettings)
Settings_co = TypeVar("Settings_co", bound=RunSettings, covariant=True)
_MOST_AGENTS = 1024


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Several values of one number: an agent for each, all in one process; with --seeds, so many for each.

    Of two numbers with as many values the first belong together, the second, and so on."""

    learning_rate: tuple[float, ...] = ()
    """Of the world model."""
    behaviour_learning_rate: tuple[float, ...] = ()
    """Of actor and critic."""
    entropy_scale: tuple[float, ...] = ()
    """Weight of the policy's entropy."""
    tau: tuple[float, ...] = ()
    """Temperature of the world model's sampler."""
    imagination_tau: tuple[float, ...] = ()
    """Temperature of imagination's sampler."""


_SWEPT = {
    "learning_rate": "agent/world_model/optimizer/learning_rate",
    "behaviour_learning_rate": "agent/behaviour/optimizer/learning_rate",
    "entropy_scale": "agent/behaviour/entropy_scale",
    "tau": "agent/replay/tau",
    "imagination_tau": "agent/replay/imagination_tau",
}
"""Field of `Sweep` -> the field of the configuration that it gives values to."""


@dataclasses.dataclass(frozen=True)
class Planned(Generic[Settings_co]):
    """One agent of a command."""

    config: Settings_co
    swept: dict[str, float] = dataclasses.field(default_factory=dict)
    """The fields of its configuration that `Sweep` has set, by path."""

    @property
    def label(self) -> str:
        """What tells it from the command's other agents."""
        values = "".join(f" {path.rpartition('/')[2]} {value:g}" for path, value in self.swept.items())
        return f"seed {self.config.seed}{values}"

    @property
    def same(self) -> dict[str, Any]:
        """Fields of a run's configuration, by path, that make it a run of this agent."""
        agent = self.config.agent
        backbone, behaviour = agent.world_model.backbone.name, agent.behaviour.name
        return {"agent/world_model/backbone/name": backbone, "agent/behaviour/name": behaviour} | self.swept


def plan(config: Settings, seeds: int, sweep: Sweep | None = None) -> list[Planned[Settings]]:
    """The agents of a command: every seed with every value swept.

    Args:
      config: Of the first.
      seeds: How many, from the configuration's on.
      sweep: The values; None where the command has no flags for them.

    Raises:
      ConfigError: if there are too many, or if a value cannot be taken.
    """
    if sweep is None and not 1 <= seeds <= _MOST_AGENTS:
        raise ConfigError(f"--seeds must be an integer from 1 to {_MOST_AGENTS}, got {seeds}")
    given = {name: values for name, values in dataclasses.asdict(sweep or Sweep()).items() if values}
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"--sweep.{name.replace('_', '-')} has {count}" for name, count in lengths.items())
        raise ConfigError(f"{counts} values; give each as many")
    points = [dict(zip(given, values)) for values in zip(*given.values())] or [{}]
    if not 1 <= seeds * len(points) <= _MOST_AGENTS:
        raise ConfigError(
            f"--seeds {seeds}: must be at least 1, and with the values swept at most {_MOST_AGENTS} agents"
        )
    if len({tuple(point.values()) for point in points}) < len(points):
        raise ConfigError(f"--sweep.{next(iter(given)).replace('_', '-')} gives the same agent twice; leave one out")
    return [
        _planned(config, seed, {_SWEPT[name]: value for name, value in point.items()})
        for point in points
        for seed in range(config.seed, config.seed + seeds)
    ]


def _planned(config: Settings, seed: int, swept: dict[str, float]) -> Planned[Settings]:
    try:
        config = dataclasses.replace(config, seed=seed)
        for path, value in swept.items():
            config = _with(config, path.split("/"), value)
    except ConfigError as error:
        raise ConfigError(with_flags(str(error))) from None
    return Planned(config, swept)


def _with(config: Any, path: Sequence[str], value: float) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
