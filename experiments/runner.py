"""A command's runs from start to end: trained together in one process, then evaluated and reported one by one.

What `experiments.atari100k` and `experiments.envpool` have in common once their flags are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from drama_jax import agent
from drama_jax.action_space import ActionSpace
from drama_jax.envs.base import Env
from drama_jax.training import loop, programs, resume, run_directory
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.member import Member, Training
from drama_jax.training.together import Together
from experiments import machine, memory, run_options
from experiments.exits import Failed
from experiments.final_scores import evaluate, report
from experiments.machine import Played
from experiments.processes import ALONE, Distributed
from experiments.runs import Run, prepare, unfinished
from experiments.sweep import Planned


def run(
    game: str,
    options: run_options.AllOptions,
    planned: Sequence[Planned[Played]],
    stop: Callable[[], bool] = lambda: False,
    distributed: Distributed = ALONE,
) -> tuple[list[Run[Played]], bool]:
    """Trains and evaluates, or goes on with that. Everything is checked before a run directory is created.

    Args:
      game: What `machine.make_environment` takes with the agents' configurations.
      options: Of the command; what is configured is in `planned`.
      planned: The agents that this process trains.
      stop: Asked after every step; True saves and ends it.
      distributed: The other processes of the command.

    Returns:
      The runs, and whether they are finished (they are not if `stop` has ended them).

    Raises:
      ConfigError: if they cannot start.
      Failed: if an emulator failed, or a last checkpoint could not be saved.
    """
    start = time.perf_counter()
    config = planned[0].config
    run_directory.check(options.logdir)
    devices = machine.choose_devices(options.devices, len(planned))
    memory.check_memory(config.agent, devices[0].memory_stats(), len(planned) // len(devices))
    machine.keep_compiled_programs(options.compilation_cache)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as games:
        environments = {
            one.config: games.enter_context(contextlib.closing(machine.make_environment(game, one.config, num_envs=1)))
            for one in planned
        }
        left = unfinished(options, game, planned, shared=distributed.shared)
        if left:
            together = Together(len(left), machine.share_out(len(left), options.devices))
            num_actions = environments[left[0].config].num_actions
            memory.check_update(config.agent, num_actions, together, together.devices[0].memory_stats())
        runs = prepare(options, game, planned, stack, shared=distributed.shared)
        if not runs:
            return [], True
        trainings, unsaved = train(runs, [environments[one.config] for one in runs], options, stop, distributed.label)
        games.close()
        finished = evaluate_all(runs, trainings, start, stop)
        if unsaved:
            raise Failed("; ".join(unsaved))
    return runs, finished


def train(
    runs: Sequence[Run[Played]],
    environments: Sequence[Env],
    options: run_options.AllOptions,
    stop: Callable[[], bool],
    label: str = "",
) -> tuple[list[Training], list[str]]:
    """The training runs with their files and a progress bar, and which last checkpoints could not be saved, and why.

    `label` is what tells this process's progress from others'.

    Raises:
      Failed: if an emulator failed, or updates were not finite.
    """
    config, first = runs[0].config, runs[0]
    # Fewer than planned if some are finished already.
    together = Together(len(runs), machine.share_out(len(runs), options.devices))
    state = initial(runs, environments[0].num_actions, together)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            contextlib.closing(Progress(config.steps, config.logging.progress, f"{label}training", first.step))
        )
        members = [_member(one, environment, progress, stack) for one, environment in zip(runs, environments)]

        def on_measured(seconds: float, steps_left: int) -> str | None:
            return machine.slow_device_notice(first.preset, seconds, steps_left)

        trainings = loop.train_together(
            config, members, state, together, progress=progress, stop=stop, on_measured=on_measured, check=options.check
        )
        problems = [member.checkpoints.problem for member in members if member.checkpoints is not None]
    unsaved = [problem for problem in problems if problem is not None]
    if trainings[0].fault is not None:
        where = ", ".join(str(one.directory) for one in runs)
        saved = "; ".join(unsaved) or f"What was learnt is saved in {where}"
        raise Failed(f"{trainings[0].fault}. {saved}; the same command continues there")
    return trainings, unsaved


def _member(run: Run[Played], environment: Env, progress: Progress, stack: contextlib.ExitStack) -> Member:
    writer = stack.enter_context(Writer(run.directory, run.config.logging, start=run.step, say=progress.say))
    checkpoints = stack.enter_context(
        contextlib.closing(
            Checkpoints(run.directory, run.identity, run.config.agent.replay.capacity, run.segments, progress.say)
        )
    )
    _, train_key, _ = _keys(run)
    return Member(environment, train_key, writer, checkpoints, run.snapshot)


def _keys(run: Run[Played]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the initial state, the training and the evaluation."""
    init_key, train_key, evaluation_key = jax.random.split(jax.random.key(run.config.seed), 3)
    return init_key, train_key, evaluation_key


def initial(runs: Sequence[Run[Played]], num_actions: ActionSpace, together: Together) -> Any:
    """The agents' states, fresh or from their checkpoints, stacked."""
    # What is static is the first run's: the others differ in nothing that is not part of the state.
    common, states = runs[0].config, []
    for index, one in enumerate(runs):
        with jax.default_device(together.device(index)):
            if one.snapshot is None:
                state = programs.initial_state(_keys(one)[0], common.agent, num_actions)
                state = dataclasses.replace(state, hyper=agent.hyper(one.config.agent))
            else:
                state = resume.restored_state(one.directory, common, num_actions, one.snapshot, one.segments)
            states.append(state)
    return together.stack(states)


def evaluate_all(
    runs: Sequence[Run[Played]], trainings: Sequence[Training], start: float, stop: Callable[[], bool]
) -> bool:
    """Evaluates and reports one run after the other; whether all are done (not if `stop` has ended it)."""
    for one, training in zip(runs, trainings):
        returns = None if training.stopped else evaluate(one, training, _keys(one)[2], stop)
        if returns is None:
            return False
        before = training.wall_clock_s - training.this_part_s
        report(one, training, returns, before + time.perf_counter() - start)
    return True
