"""What a run asks of the machine: an emulator, devices, compiled programs that last, time."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import jax

from drama_jax.config import ConfigError, RunConfig, TaskRunConfig
from drama_jax.envs import Env, make_atari
from drama_jax.envs.envpool_tasks import describe, make_task
from experiments import command_line

Played = RunConfig | TaskRunConfig
"""What there are environments for."""


def make_environment(game: str, config: Played, *, num_envs: int, evaluation: bool = False) -> Env:
    """The training environment, or those of the evaluation with their own seeds and step limit.

    Args:
      game: Atari game, or with a `TaskRunConfig` task of EnvPool.
      config: of the run.
      num_envs: How many.
      evaluation: What for.

    Raises:
      ConfigError: if the emulator is missing or refuses its settings.
    """
    if isinstance(config, TaskRunConfig):
        return _make_task(game, config, num_envs=num_envs, evaluation=evaluation)
    atari, seed = config.atari, config.seed
    if evaluation:
        atari = dataclasses.replace(atari, max_episode_steps=config.evaluation.max_episode_steps)
        seed += 1  # the training environment has one seed only
    image_size = config.agent.world_model.autoencoder.image_size
    try:
        return make_atari(game, atari, num_envs=num_envs, image_size=image_size, seed=seed)
    except ConfigError as error:
        message = command_line.with_flags(str(error))
        raise ConfigError(
            message if message.startswith("--") else f"--env-backend {atari.backend}: {message}"
        ) from None


def _make_task(name: str, config: TaskRunConfig, *, num_envs: int, evaluation: bool) -> Env:
    task, size = config.task, config.agent.world_model.autoencoder.image_size
    try:
        if evaluation:
            limit = task.max_episode_steps or describe(name).max_episode_steps
            task = dataclasses.replace(task, max_episode_steps=min(limit, config.evaluation.max_episode_steps))
        return make_task(name, task, num_envs=num_envs, image_size=size, seed=config.seed + evaluation)
    except ConfigError as error:
        message = command_line.with_flags(str(error))
        raise ConfigError(message if message.startswith("--") else f"--task: {message}") from None


def share_out(agents: int, at_most: int | None = None) -> list[jax.Device]:
    """The local devices, at most so many, that `agents` agents go to: as many as can have the same number of agents."""
    there = jax.local_devices()[:at_most]
    return there[: max(count for count in range(1, len(there) + 1) if agents % count == 0)]


def choose_devices(wanted: int | None, agents: int) -> list[jax.Device]:
    """`share_out`, or the first `wanted` devices.

    Raises:
      ConfigError: if there are not `wanted` devices, or they cannot have the same number of agents.
    """
    there = jax.local_devices()
    if wanted is None:
        return share_out(agents)
    if not 1 <= wanted <= len(there):
        raise ConfigError(f"--devices {wanted}: there are {len(there)} here")
    if agents % wanted:
        raise ConfigError(f"--devices {wanted}: {agents} agents cannot be shared out evenly; change --seeds")
    return there[:wanted]


def keep_compiled_programs(directory: pathlib.Path | None) -> None:
    """Lets JAX keep compiled programs in `directory`, so that the next run starts at once; None leaves JAX as it is."""
    if directory is not None and str(directory).lower() != "none":
        try:
            path = directory.expanduser()
        except RuntimeError as error:
            raise ConfigError(f"--compilation-cache {directory}: {error}") from error
        jax.config.update("jax_compilation_cache_dir", str(path))


def set_xla_flags(*, deterministic: bool, agents: int = 1) -> None:
    """Says how XLA shall compile for a GPU; before JAX has started the device. A flag of the user's own is kept.

    Args:
      deterministic: ask for programs that give the same bits in every run.
      agents: trained in one program.
    """
    wanted = {
        # cuBLAS instead of Triton for matrix products saves 0.25 ms of a step's 15.4 (H200, preset xs).
        "xla_gpu_enable_triton_gemm": "false",
    }
    if agents == 1:
        # Nodes of a CUDA graph depend on what they read alone, not on each other in the order of the program: waited
        # for, a world-model update takes 8.1 to 8.4 ms instead of 8.7 to 8.8 (one H100, preset xs). Not for several
        # agents: an update takes 6 GB for each instead of 4, and twelve do not fit in 80.
        wanted["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
    if deterministic:
        wanted["xla_gpu_deterministic_ops"] = "true"
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def slow_device_notice(preset: str, seconds: float, steps_left: int) -> str | None:
    """How long the run will take, for a run on a CPU of any preset but tiny."""
    if preset == "tiny" or jax.default_backend() != "cpu":
        return None
    total = seconds * steps_left
    unit, size = next((pair for pair in (("days", 86_400), ("hours", 3_600)) if total > 2 * pair[1]), ("minutes", 60))
    return (
        f"No GPU found: at {seconds:.2g} s per step the remaining {steps_left:,} steps take about "
        f"{total / size:.1f} {unit} on this CPU. `--preset tiny` ends in minutes. Going on."
    )
