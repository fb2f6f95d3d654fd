"""One command started as several processes, on one machine or several: which of its agents are this process's.

Agents do not talk to each other, so neither do the processes. They meet once through `jax.distributed`, before anything
is begun, and part when each knows its number and that all were started with the same command. What happens to one
later does not touch the others: one that is killed is started again with its command and goes on by itself.

The meeting is a program of its own (`python -m experiments.meeting`), because JAX aborts a process whose meeting
fails, and because a process that has once met with others cannot let go of its number again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from drama_jax.config import ConfigError
from experiments import processes
from experiments.processes import AUTO, Distributed
from experiments.sweep import Planned, Settings

_AGREE_S = 10
"""How long those that have met wait for each other's command."""
_LATER_S = 60
"""What the meeting may take beyond its limits before it is ended."""
_MET, _DISAGREED = "met", 3


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a process among the others."""

    index: int
    count: int
    visible_devices: str
    """Those of its machine that it may use, by number, as JAX names them; all: all."""


def share(
    wanted: Distributed, name: Sequence[str], planned: Sequence[Planned[Settings]]
) -> tuple[Distributed, list[Planned[Settings]]]:
    """Meets with the other processes of the command, if it has any; before JAX has started the device.

    Args:
      wanted: Its flags.
      name: What else, beside its agents, must be the same in all of them: game and preset.
      planned: Its agents.

    Returns:
      The flags with this process's number in them, and every P-th agent, from that number on.

    Raises:
      ConfigError: if there are more processes than agents, or if they do not meet, or were started with different
        commands.
    """
    processes.check(wanted)
    if wanted.coordinator is None:
        return wanted, list(planned)
    processes.check_agents(wanted.processes or 1, len(planned))
    what = [*name, wanted.processes, [(one.config, one.swept) for one in planned]]
    place = meet(wanted, hashlib.sha256(repr(what).encode()).hexdigest())
    processes.check_agents(place.count, len(planned))
    if place.visible_devices != "all":
        jax.config.update("jax_cuda_visible_devices", place.visible_devices)
        jax.config.update("jax_rocm_visible_devices", place.visible_devices)
    own = list(planned[place.index :: place.count])
    print(f"process {place.index} of {place.count}: {', '.join(one.label for one in own)}", flush=True)
    return dataclasses.replace(wanted, processes=place.count, process=place.index), own


def meet(wanted: Distributed, command: str) -> Place:
    """Waits for all processes of the command.

    Args:
      wanted: The flags.
      command: What must be the same in all of them.

    Raises:
      ConfigError: if they do not all come, or do not agree.
    """
    what = {
        "coordinator": None if wanted.coordinator == AUTO else wanted.coordinator,
        "processes": wanted.processes,
        "process": wanted.process,
        "timeout": wanted.timeout,
        "command": command,
        "agree_s": _AGREE_S,
    }
    try:
        # JAX may take its limit twice: to connect, and to wait for the others.
        done = subprocess.run(
            [sys.executable, "-m", "experiments.meeting", json.dumps(what)],
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * wanted.timeout + _AGREE_S + _LATER_S,
        )
        said, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        said, errors, code = (error.stdout or b"").decode(), "DEADLINE_EXCEEDED", -1
    if code == 0:
        return Place(**json.loads(said.splitlines()[-1]))
    raise ConfigError(_reason(wanted, said, errors))


def _reason(wanted: Distributed, said: str, errors: str) -> str:
    """Why a meeting has failed, in a line."""
    if _MET in said.splitlines():
        return (
            "--distributed: the processes were not all started with the same command (game, preset, seeds, settings, "
            "--distributed.processes)"
        )
    if "ALREADY_EXISTS" in errors:
        return f"--distributed.process {wanted.process}: another process has this number"
    if "Unexpected task" in errors:
        return f"--distributed.processes {wanted.processes}: the coordinator was started with another number"
    if wanted.coordinator == AUTO and "ValueError" in errors:
        return (
            "--distributed.coordinator auto: no cluster found that JAX knows; give HOST:PORT, --distributed.processes "
            "and --distributed.process"
        )
    if any(sign in errors for sign in ("Failed to add port", "Failed to start RPC server")):
        return f"--distributed.coordinator {wanted.coordinator}: process 0 cannot listen there; choose another port"
    if any(sign in errors for sign in ("DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED")):
        others = "" if wanted.processes is None else f" {wanted.processes}"
        return (
            f"--distributed.coordinator {wanted.coordinator}: the{others} processes did not meet there within "
            f"{wanted.timeout} s; it cannot be reached, or one of them was not started"
        )
    lines = [line for line in errors.splitlines() if line.strip()] or ["no reason given"]
    return f"--distributed.coordinator {wanted.coordinator}: {' '.join(lines[-1].split())[:200]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The meeting: prints this process's place as JSON."""
    what: dict[str, Any] = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    # Nothing is computed here; no device is asked for.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", None)
    jax.config.update("jax_cpu_get_local_topology_timeout_minutes", 1)
    jax.config.update("jax_cpu_get_global_topology_timeout_minutes", 1)
    jax.distributed.initialize(
        what["coordinator"],
        what["processes"],
        what["process"],
        initialization_timeout=what["timeout"],
        shutdown_timeout_seconds=what["agree_s"],
    )
    print(_MET, flush=True)
    from orbax.checkpoint import multihost

    index = jax.process_index()
    try:
        multihost.get_barrier_sync_fn()(key=what["command"], timeout_ms=1000 * what["agree_s"])
    except jax.errors.JaxRuntimeError:
        time.sleep(0 if index else 1)  # the others need process 0 until they have found the same
        os._exit(_DISAGREED)  # without a farewell, which they would miss
    place = Place(index, jax.process_count(), str(jax.config.read("jax_cuda_visible_devices")))
    jax.distributed.shutdown()
    print(json.dumps(dataclasses.asdict(place)), flush=True)


if __name__ == "__main__":
    main()
