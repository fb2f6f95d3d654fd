"""How a command ends: its exit code, and one line where something went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax

from drama_jax.config import ConfigError


class Failed(RuntimeError):  # noqa: N818 - the run did, not this program
    """The run ended early through no mistake of the user; the message says why."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command to its end; returns the exit code.

    0: it is finished, or a signal ended it and it is saved. 1: it failed on the way. 2: a mistake of the user. One
    line explains each of the last two.
    """
    try:
        command()
    except (ConfigError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: the device has not enough memory ({' '.join(str(error).split())[:200]}); lower the batch sizes, "
            f"--agent.replay.capacity or --seeds",
            file=sys.stderr,
        )
        return 1
    return 0
