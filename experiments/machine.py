"""What a run asks of the machine: an emulator, memory, compiled programs that last, time."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

import jax

from drama_jax.action_space import ActionSpace
from drama_jax.config import AgentConfig, ConfigError, RunConfig, TaskRunConfig
from drama_jax.envs import Env, make_atari
from drama_jax.envs.envpool_tasks import describe, make_task
from drama_jax.training import programs
from drama_jax.training.together import Together
from experiments import command_line

Played = RunConfig | TaskRunConfig
"""What there are environments for."""
_BESIDES = 1.08
"""What a run takes over what the compiler counts for the update. Measured once, H100, preset xs: at most 4.05 GB in the
real loop, where the compiler counts 3.79. The rest is acting, images, and copies that are being saved."""


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


def check_memory(config: AgentConfig, stats: dict[str, int] | None, agents: int = 1) -> None:
    """Raises a ConfigError if the arrays that the agents keep do not fit the device; takes no time.

    Args:
      config: The configuration of every agent.
      stats: The device's memory statistics; None where it keeps none, as on a CPU, whose memory is the machine's.
      agents: How many live on the device.
    """
    try:
        needed = memory_needed(config)
    except ConfigError as error:
        raise ConfigError(command_line.with_flags(str(error))) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"--agent: arrays of these sizes cannot be made ({' '.join(str(error).split())})") from error
    if stats and "bytes_limit" in stats:
        free, where = stats["bytes_limit"] - stats.get("bytes_in_use", 0), "device memory"
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        free, where = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory"
    else:
        return
    total = sum(needed.values())
    if total > free:
        flag = max(needed, key=lambda name: needed[name])
        raise ConfigError(
            f"{flag}: needs {needed[flag]:,} of {total:,} bytes of {where}, but {free:,} are free; lower it"
        )
    if total * agents > free:
        fit = free // total
        if where == "device memory":  # of a GPU, where the activations are known for the asking
            fit = min(fit, most_agents(config, 18, jax.local_devices()[0], free, many=2))
        raise _too_many(agents, total * agents, where, free, fit)


def _too_many(agents: int, needed: int, where: str, free: int, fit: int) -> ConfigError:
    if agents == 1:
        return ConfigError(
            f"--agent: an agent needs {needed:,} bytes of {where}, but {free:,} are free; lower the batch sizes or "
            f"--agent.replay.capacity"
        )
    share = "; XLA_PYTHON_CLIENT_MEM_FRACTION is the share that JAX may have" if where == "device memory" else ""
    return ConfigError(
        f"--seeds: {agents} agents need {needed:,} bytes of {where}, but {free:,} are free; at most {fit} fit on one "
        f"device{share}"
    )


def check_update(
    config: AgentConfig, num_actions: ActionSpace, together: Together, stats: dict[str, int] | None
) -> None:
    """Raises a ConfigError if the update of all agents, activations included, does not fit a device.

    The number is that of the compiled update itself, times `_BESIDES`: how much of what is computed is there at once
    depends on how XLA fuses and orders the program, which no formula of ours knows. The program is the one that the
    loop will run, and JAX keeps it, so that a run that fits loses no time. For one that does not, the update of a
    single agent is compiled as well, and how many fit is read off the line through the two.

    Args:
      config: Of every agent.
      num_actions: A of the game, or `Continuous(A)`.
      together: How the agents lie on the devices.
      stats: A device's memory statistics; None where it keeps none, as on a CPU, where nothing is compiled here.
    """
    if not stats or "bytes_limit" not in stats:
        return
    free, agents = stats["bytes_limit"] - stats.get("bytes_in_use", 0), together.count // len(together.devices)
    needed = _bytes(config, num_actions, together)
    if needed is not None and needed > free:
        fit = 0 if agents == 1 else most_agents(config, num_actions, together.devices[0], free, many=agents)
        raise _too_many(agents, needed, "device memory", free, fit)


def most_agents(config: AgentConfig, num_actions: ActionSpace, device: jax.Device, free: int, *, many: int) -> int:
    """How many agents fit into `free` bytes of a device, by the compiled updates of one and of `many` > 1 of them."""
    one, several = (_bytes(config, num_actions, Together(count, [device])) for count in (1, many))
    if one is None or several is None:
        return sys.maxsize  # no account is no limit
    each = max((several - one) / (many - 1), 1.0)
    return max(0, 1 + math.floor((free - one) / each))


def _bytes(config: AgentConfig, num_actions: ActionSpace, together: Together) -> int | None:
    """What the agents of a device take of it."""
    found = programs.update_bytes(config, num_actions, together)
    if found is None:
        return None
    states, at_once = found
    copies = 2 if together.count > 1 else 1  # while they are stacked, every state is there twice
    return max(math.ceil(_BESIDES * at_once), copies * states)


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


def memory_needed(config: AgentConfig) -> dict[str, int]:
    """Flag -> bytes that it makes the agent take; less than in truth, as activations are left out."""

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    state = programs.shapes(config, num_actions=18)
    wm, im = config.world_model, config.imagination
    frame = math.prod(wm.autoencoder.frame_shape)
    return {
        f"--agent.replay.capacity {config.replay.capacity}": size(state.replay),
        "--agent.world-model (sizes)": size(state.world_model),
        "--agent.behaviour (sizes)": size(state.behaviour),
        f"--agent.acting-context {config.acting_context}": config.acting_context * frame,
        f"--agent.world-model.batch-size {wm.batch_size}": wm.batch_size * wm.batch_length * frame,
        f"--agent.imagination.horizon {im.horizon}": im.batch_size * (im.horizon + 1) * wm.feature_size * 2,
    }


def keep_compiled_programs(directory: pathlib.Path | None) -> None:
    """Lets JAX keep compiled programs in `directory`, so that the next run starts at once; None leaves JAX as it is."""
    if directory is not None and str(directory).lower() != "none":
        try:
            path = directory.expanduser()
        except RuntimeError as error:
            raise ConfigError(f"--compilation-cache {directory}: {error}") from error
        jax.config.update("jax_compilation_cache_dir", str(path))


def set_xla_flags(*, deterministic: bool) -> None:
    """Says how XLA shall compile for a GPU; before JAX has started the device. A flag of the user's own is kept.

    Args:
      deterministic: ask for programs that give the same bits in every run.
    """
    # cuBLAS instead of Triton for matrix products saves 0.25 ms of a step's 15.4 (H200, preset xs).
    wanted = {"xla_gpu_enable_triton_gemm": "false"} | ({"xla_gpu_deterministic_ops": "true"} if deterministic else {})
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
