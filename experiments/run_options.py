"""What the command lines of `experiments.atari100k` and `experiments.envpool` have in common; `filled`, of all."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from drama_jax.config import AgentConfig, AnyRunConfig, BackboneName, BehaviourName, EvaluationConfig, LoggingConfig
from experiments import command_line

Kind = TypeVar("Kind", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that most runs need; those without a text have one in each command."""

    game: str
    preset: str
    steps: int
    """Agent steps to train for."""
    seed: int
    """Seed of everything random."""
    seeds: int
    """Agents to train in one process, of seeds SEED, SEED + 1, ...; each has its own run directory."""
    devices: int | None
    """GPUs of this machine to share the agents out to; as many as divide their number if not given."""
    logdir: pathlib.Path
    eval_episodes: int
    """Episodes played to their end after training; 0 skips the evaluation."""
    backbone: BackboneName
    """Sequence model, of mamba2's size."""
    behaviour: BehaviourName
    """How actor and critic learn."""
    sampler: Literal["dfs", "uniform"]
    """How the replay is sampled: dynamic frequency-based sampling, or uniformly."""
    compilation_cache: pathlib.Path | None
    """Where compiled programs are kept for the next run; None to keep none."""
    resume: bool
    deterministic: bool
    """Make a GPU give the same numbers in every run of a seed, and take longer. A CPU always does."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Options):
    """The flags that most runs need, and every other field; each command adds its environment's."""

    agent: AgentConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig
    max_skipped_updates: int
    """Stop after so many updates in a row whose loss or gradient was not finite; each is skipped and counted."""
    debug_nans: bool
    """For developers: stop with a traceback where the first NaN is made (jax_debug_nans); slow."""
    check: bool
    """For developers: check the agent's invariants after every step (chex); slow."""


def defaults(kind: type[Kind], base: AnyRunConfig, **own: Any) -> Kind:
    """The preset's values, as the defaults of the flags; those that a command has alone are in `own`."""
    values: dict[str, Any] = {
        "eval_episodes": base.evaluation.episodes,
        "backbone": base.agent.world_model.backbone.name,
        "behaviour": base.agent.behaviour.name,
        "sampler": base.agent.replay.sampler,
        "deterministic": False,
        "evaluation": base.evaluation,
        "debug_nans": False,
        "check": False,
    }
    found: Kind = filled(kind, base, **values | own)
    return found


def filled(kind: type[Any], base: Any, **own: Any) -> Any:
    """The defaults of the flags `kind` of a command that trains: what all of them have, and its `own`.

    Args:
      kind: a dataclass of flags.
      base: the preset, of whatever configuration; it has steps, seed, agent, logging and max_skipped_updates.
      own: values of its other flags; names that `kind` lacks are passed over.
    """
    values: dict[str, Any] = {
        "seeds": 1,
        "devices": None,
        "logdir": pathlib.Path("runs"),
        "compilation_cache": command_line.compilation_cache(),
        "resume": True,
    }
    values |= {name: getattr(base, name) for name in ("steps", "seed", "agent", "logging", "max_skipped_updates")}
    values |= own
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def show_help(
    arguments: Sequence[str],
    kinds: tuple[type[Options], type[AllOptions]],
    program: str,
    description: str,
    default: Callable[[type[Options]], Options],
) -> None:
    """Shows the help that the arguments ask for, if they do: of the flags that most runs need, or of all.

    Raises:
      SystemExit: with code 0 after it.
    """
    short, long = kinds
    for flag, kind in {"--help-all": long, "--help": short, "-h": short}.items():
        if flag in arguments:
            command_line.parse_plain(kind, ["--help"], program, description, default(kind))


def resolve(options: AllOptions, base: AnyRunConfig) -> dict[str, Any]:
    """The fields that every run has; a plain flag that differs from the preset's value wins over its dotted twin.

    Args:
      options: What was parsed.
      base: The preset.
    """
    agent, evaluation = options.agent, options.evaluation
    if options.sampler != base.agent.replay.sampler:
        agent = dataclasses.replace(agent, replay=dataclasses.replace(agent.replay, sampler=options.sampler))
    if options.eval_episodes != base.evaluation.episodes:
        evaluation = dataclasses.replace(evaluation, episodes=options.eval_episodes)
    same = {name: getattr(options, name) for name in ("logging", "steps", "max_skipped_updates", "seed")}
    return {"agent": agent, "evaluation": evaluation} | same
