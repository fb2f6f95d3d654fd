"""Flags of a command that is started as several processes, on one machine or several; see `meeting`."""

from __future__ import annotations

import dataclasses
import re

from drama_jax.config import ConfigError

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Distributed:
    """The same command started several times, on one machine or several; each process trains its share of the agents.

    They meet at the start and then go on by themselves."""

    coordinator: str | None = None
    """HOST:PORT of process 0, any free port of its machine; auto: all from Slurm, Open MPI or Kubernetes."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """The number of this one, from 0."""
    timeout: int = 300
    """Seconds to wait for the others."""

    @property
    def shared(self) -> bool:
        """Whether the command has agents that other processes train."""
        return (self.processes or 1) > 1

    @property
    def label(self) -> str:
        """What tells this process's output from the others'."""
        return "" if self.process is None else f"process {self.process} of {self.processes}: "


ALONE = Distributed()
"""The only process of its command."""


def check(wanted: Distributed) -> None:
    """Raises a ConfigError if the flags do not fit each other."""
    given = {f"--distributed.{name} {getattr(wanted, name)}": name for name in ("processes", "process")}
    given = {flag: name for flag, name in given.items() if getattr(wanted, name) is not None}
    if wanted.coordinator is None:
        if given:
            raise ConfigError(f"{next(iter(given))} needs --distributed.coordinator HOST:PORT, or auto")
        return
    if wanted.processes is not None and wanted.processes < 1:
        raise ConfigError(f"--distributed.processes {wanted.processes}: must be at least 1")
    if wanted.process is not None and not 0 <= wanted.process < (wanted.processes or wanted.process + 1):
        raise ConfigError(f"--distributed.process {wanted.process}: must be from 0 to one less than the processes")
    if wanted.timeout < 1:
        raise ConfigError(f"--distributed.timeout {wanted.timeout}: must be at least 1 second")
    if wanted.coordinator != AUTO:
        if not re.fullmatch(r"[^\s:/]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}", wanted.coordinator):
            raise ConfigError(
                f"--distributed.coordinator {wanted.coordinator!r}: must be HOST:PORT of process 0, or auto"
            )
        missing = [name for name in ("processes", "process") if getattr(wanted, name) is None]
        if missing:
            raise ConfigError(
                f"--distributed.coordinator {wanted.coordinator}: --distributed.{missing[0]} is missing; or leave all "
                f"to the cluster with --distributed.coordinator auto"
            )


def check_agents(processes: int, agents: int) -> None:
    """Raises a ConfigError if there are more processes than agents."""
    if agents < processes:
        raise ConfigError(
            f"--distributed.processes: {processes} processes have {agents} agents; start as many processes at most, or "
            f"raise --seeds"
        )
