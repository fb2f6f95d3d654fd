"""The command line of `experiments.envpool`: presets fitted to the task, and a dotted flag for every other field."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from drama_jax.config import (
    AgentConfig,
    BackboneName,
    BehaviourName,
    ConfigError,
    EvaluationConfig,
    RunConfig,
    TaskConfig,
    TaskRunConfig,
    preset,
    with_backbone,
)
from drama_jax.envs.envpool_tasks import Task, describe
from experiments import command_line, jax_presets, run_options
from experiments.run_options import Kind

PROGRAM = "python -m experiments.envpool"
_PRESETS = ("tiny", "xs")
_EXAMPLE = "CheetahRun-v1"
_DESCRIPTION = """Trains Drama on a task of EnvPool that is not Atari, and evaluates it. Steps are agent steps.

Every other setting has a dotted flag, applied over the preset, for example
--agent.replay.tau 20, --task-rules.max-episode-steps 500, --logging.no-tensorboard.
--help-all lists them with the chosen preset's values."""


@dataclasses.dataclass(frozen=True)
class Options(run_options.Options):
    """The flags that most runs need."""

    game: Annotated[str, tyro.conf.arg(name="task")]
    """Task of EnvPool, for example CheetahRun-v1, CoinrunEasy-v0 or HalfCheetah-v4."""
    preset: Literal["tiny", "xs"]
    """tiny: minutes on a laptop CPU. xs: the paper's 7 M-parameter model."""
    logdir: pathlib.Path
    """Runs go to LOGDIR/TASK/PRESET/seedK-TIME. May also be such a directory, to continue that run."""
    resume: bool
    """Continue the newest unfinished run of this task, preset and seed; --no-resume starts a new one."""


@dataclasses.dataclass(frozen=True)
class AllOptions(Options, run_options.AllOptions):
    """The flags that most runs need, and every other field."""

    task_rules: TaskConfig


def parse(arguments: Sequence[str]) -> tuple[AllOptions, TaskRunConfig]:
    """The options, and the resolved configuration of the first seed's run.

    Raises:
      ConfigError: for any mistake in `arguments`, with one line that names the flag.
      SystemExit: with code 0 after --help or --help-all.
    """
    name = command_line.chosen(arguments, "preset", "xs", _PRESETS)
    parts = command_line.chosen_parts(arguments)
    run_options.show_help(
        arguments,
        (Options, AllOptions),
        PROGRAM,
        _DESCRIPTION,
        functools.partial(_defaults, name=name, task=_EXAMPLE, base=_fitted(name, *parts, (1,))),
    )
    try:
        task = describe(_task(arguments))
    except ConfigError as error:
        raise ConfigError(f"--task: {error}") from None
    base = _fitted(name, *parts, task.shape)
    default = _defaults(AllOptions, name=name, task=task.name, base=base)
    options = command_line.parse_plain(AllOptions, arguments, PROGRAM, None, default)
    try:
        config = TaskRunConfig(task=options.task_rules, **run_options.resolve(options, base))
    except ConfigError as error:
        raise ConfigError(command_line.with_flags(str(error))) from None
    _check(task, config)
    return options, config


def _task(arguments: Sequence[str]) -> str:
    """What --task is given, because it decides the defaults of others."""
    task = command_line.given(arguments, "task")
    if task is None:
        raise ConfigError(f"name one, for example --task {_EXAMPLE}")
    return task


def _defaults(kind: type[Kind], *, name: str, task: str, base: TaskRunConfig) -> Kind:
    return run_options.defaults(kind, base, game=task, preset=name, task_rules=base.task)


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
