"""The command line of `experiments.envpool`: presets fitted to the task, and a dotted flag for every other field."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Sequence
from typing import Any, Literal

from drama_jax.config import (
    AgentConfig,
    BackboneName,
    BehaviourName,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    RunConfig,
    TaskConfig,
    TaskRunConfig,
    preset,
    with_backbone,
)
from drama_jax.envs.envpool_tasks import Task, describe
from experiments import command_line, jax_presets
from experiments.command_line import Distributed

PROGRAM = "python -m experiments.envpool"
_PRESETS = ("tiny", "xs")
_MOST_SEEDS = 1024
_EXAMPLE = "CheetahRun-v1"
_DESCRIPTION = """Trains Drama on a task of EnvPool that is not Atari, and evaluates it. Steps are agent steps.

Every other setting has a dotted flag, applied over the preset, for example
--agent.replay.tau 20, --task-rules.max-episode-steps 500, --logging.no-tensorboard.
--help-all lists them with the chosen preset's values."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that most runs need."""

    task: str
    """Task of EnvPool, for example CheetahRun-v1, CoinrunEasy-v0 or HalfCheetah-v4."""
    preset: Literal["tiny", "xs"]
    """tiny: minutes on a laptop CPU. xs: the paper's 7 M-parameter model."""
    steps: int
    """Agent steps to train for."""
    seed: int
    """Seed of everything random."""
    seeds: int
    """Agents to train in one process, of seeds SEED, SEED + 1, ...; each has its own run directory."""
    devices: int | None
    """GPUs of this machine to share the agents out to; as many as divide their number if not given."""
    logdir: pathlib.Path
    """Runs go to LOGDIR/TASK/PRESET/seedK-TIME. May also be such a directory, to continue that run."""
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
    """Continue the newest unfinished run of this task, preset and seed; --no-resume starts a new one."""
    deterministic: bool
    """Make a GPU give the same numbers in every run of a seed, and take longer. A CPU always does."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Options):
    """The flags that most runs need, and every other field."""

    agent: AgentConfig
    task_rules: TaskConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig
    max_skipped_updates: int
    """Stop after so many updates in a row whose loss or gradient was not finite; each is skipped and counted."""
    debug_nans: bool
    """For developers: stop with a traceback where the first NaN is made (jax_debug_nans); slow."""
    check: bool
    """For developers: check the agent's invariants after every step (chex); slow."""

    @property
    def distributed(self) -> Distributed:
        """One process trains all agents."""
        return Distributed()


def parse(arguments: Sequence[str]) -> tuple[AllOptions, list[TaskRunConfig]]:
    """The options, and the resolved configuration of each seed's run.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help or --help-all.
    """
    name = command_line.chosen(arguments, "preset", "xs", _PRESETS)
    backbone = command_line.chosen(arguments, "backbone", "mamba2", typing.get_args(BackboneName))
    behaviour = command_line.chosen(arguments, "behaviour", "actor_critic", typing.get_args(BehaviourName))
    for flag, kind in {"--help-all": AllOptions, "--help": Options, "-h": Options}.items():
        if flag in arguments:
            defaults = _defaults(kind, name, _EXAMPLE, _fitted(name, backbone, behaviour, (1,)))
            command_line.parse_plain(kind, ["--help"], PROGRAM, _DESCRIPTION, defaults)
    try:
        task = describe(_task(arguments))
    except ConfigError as error:
        raise ConfigError(f"--task: {error}") from None
    base = _fitted(name, backbone, behaviour, task.shape)
    options = command_line.parse_plain(
        AllOptions, arguments, PROGRAM, None, _defaults(AllOptions, name, task.name, base)
    )
    if not 1 <= options.seeds <= _MOST_SEEDS:
        raise ConfigError(f"--seeds must be an integer from 1 to {_MOST_SEEDS}, got {options.seeds}")
    try:
        seeds = range(options.seed, options.seed + options.seeds)
        config = TaskRunConfig(task=options.task_rules, **command_line.resolve_common(options, base))
        configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    except ConfigError as error:
        raise ConfigError(command_line.with_flags(str(error)).replace("TaskRunConfig.", "")) from None
    _check(task, configs[0])
    return options, configs


def _task(arguments: Sequence[str]) -> str:
    """What --task is given, before anything else is parsed, because it decides the defaults of others."""
    for index, argument in enumerate(arguments):
        if argument == "--task" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--task="):
            return argument.removeprefix("--task=")
    raise ConfigError(f"name one, for example --task {_EXAMPLE}")


def _fitted(name: str, backbone: BackboneName, behaviour: BehaviourName, shape: tuple[int, ...]) -> TaskRunConfig:
    """A preset for observations of a shape; what is tiny for a vector has learnt Pendulum and CartPole."""
    base = preset(name)
    if len(shape) == 1 and name == "tiny":
        agent = jax_presets.PRESETS["vector"]().agent
        # Of Atari until the vector's size is set below.
        images = dataclasses.replace(agent.world_model.autoencoder, image_channels=3)
        agent = dataclasses.replace(agent, world_model=dataclasses.replace(agent.world_model, autoencoder=images))
        base = dataclasses.replace(base, agent=agent)
    agent = with_backbone(base, backbone).agent
    if len(shape) == 1:
        vector = dataclasses.replace(agent.world_model.autoencoder, vector_size=shape[0])
        agent = dataclasses.replace(agent, world_model=dataclasses.replace(agent.world_model, autoencoder=vector))
    agent = dataclasses.replace(agent, behaviour=dataclasses.replace(agent.behaviour, name=behaviour))
    return _task_run(base, agent)


def _task_run(base: RunConfig, agent: AgentConfig) -> TaskRunConfig:
    evaluation = dataclasses.replace(base.evaluation, max_episode_steps=EvaluationConfig().max_episode_steps)
    return TaskRunConfig(agent=agent, evaluation=evaluation, logging=base.logging, steps=base.steps)


def _check(task: Task, config: TaskRunConfig) -> None:
    """Raises a ConfigError if flags ask for other observations than the task's, or a limit that it does not keep to."""
    autoencoder, flag = config.agent.world_model.autoencoder, "--agent.world-model.autoencoder"
    size = task.shape[0] if len(task.shape) == 1 else 0
    if autoencoder.vector_size != size:
        raise ConfigError(f"{flag}.vector-size must be {size} for {task.name}, got {autoencoder.vector_size}")
    if size == 0 and autoencoder.image_channels != 3:
        raise ConfigError(f"{flag}.image-channels must be 3 for {task.name}, got {autoencoder.image_channels}")
    own = task.max_episode_steps
    for name, limit in (
        ("task-rules", config.task.max_episode_steps or own),
        ("evaluation", min(own, config.evaluation.max_episode_steps)),
    ):
        if task.limit_is_fixed and limit != own:
            raise ConfigError(
                f"--{name}.max-episode-steps must be {own} for {task.name}, which keeps to its own limit, got {limit}"
            )


def _defaults(kind: type[Any], name: str, task: str, base: TaskRunConfig) -> Any:
    """The preset's values, as the defaults of the flags."""
    values: dict[str, Any] = {
        "task": task,
        "preset": name,
        "steps": base.steps,
        "seed": base.seed,
        "seeds": 1,
        "devices": None,
        "logdir": pathlib.Path("runs"),
        "eval_episodes": base.evaluation.episodes,
        "backbone": base.agent.world_model.backbone.name,
        "behaviour": base.agent.behaviour.name,
        "sampler": base.agent.replay.sampler,
        "compilation_cache": command_line.compilation_cache(),
        "resume": True,
        "deterministic": False,
        "agent": base.agent,
        "task_rules": base.task,
        "evaluation": base.evaluation,
        "logging": base.logging,
        "max_skipped_updates": base.max_skipped_updates,
        "debug_nans": False,
        "check": False,
    }
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
