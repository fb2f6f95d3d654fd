"""Whether the agents of a command fit the device's memory, asked before anything starts."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import jax

from drama_jax.action_space import ActionSpace
from drama_jax.config import AgentConfig, ConfigError
from drama_jax.training import programs
from drama_jax.training.together import Together
from experiments import command_line

_BESIDES = 1.08
"""What a run takes over what the compiler counts for the update. Measured once, H100, preset xs: at most 4.05 GB in the
real loop, where the compiler counts 3.79. The rest is acting, images, and copies that are being saved."""


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
    found = _free(stats)
    if found is None:
        return
    free, where = found
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


def _free(stats: dict[str, int] | None) -> tuple[int, str] | None:
    """Bytes that are free, and of what; None if the system does not say."""
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "device memory"
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory"
    return None


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
