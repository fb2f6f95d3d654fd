"""Rows of a benchmark, each measured in a process of its own and under a time limit.

A kernel that faults or hangs takes its process's device with it; what went wrong is then in its row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LIMIT = 150
"""Seconds for a row."""


def rows(module: str, wanted: Iterable[tuple[dict[str, Any], list[str]]]) -> Iterator[dict[str, Any]]:
    """Runs `python -m MODULE FLAGS` for each of (what the row begins with, flags).

    The last line that it prints is the rest of the row, as JSON.
    """
    # The process that calls this may only have asked the device for its name; the memory is for the others.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    for begun, flags in wanted:
        command = [sys.executable, "-m", module, *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT, env=environment)
        except subprocess.TimeoutExpired:
            yield begun | {"error": f"no result in {LIMIT} s"}
            continue
        if done.returncode:
            said = done.stderr.partition("-" * 20)[0].strip()  # a remark on tracebacks
            yield begun | {"error": "\n".join(said.splitlines()[-3:])[-1000:]}
        else:
            yield begun | json.loads(done.stdout.splitlines()[-1])
