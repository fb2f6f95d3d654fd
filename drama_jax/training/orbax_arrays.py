"""Named numpy arrays on disk, through orbax. It pickles nothing: arrays are compressed chunks, their names JSON."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

from drama_jax.training import arrays


def write(path: pathlib.Path, flat: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name to a new directory.

    Raises:
      OSError, ValueError: they cannot be written; orbax reports a full disk as a ValueError.
    """
    import orbax.checkpoint as ocp

    _check_space(path.parent, sum(array.nbytes for array in flat.values()))
    with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.StandardSave(arrays.nest(flat)))


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays that `write` wrote, on the host."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return arrays.flatten(checkpointer.restore(path.absolute(), args=ocp.args.StandardRestore()))


def _check_space(folder: pathlib.Path, needed: int) -> None:
    """A full disk in the middle of a write makes tensorstore print more than a line."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that orbax logs before it raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
