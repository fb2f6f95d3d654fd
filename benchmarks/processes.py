"""Benchmarks whose rows are measured each in a process of its own and under a time limit.

A kernel that faults or hangs takes its process's device with it; what went wrong is then in its row.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import common

LIMIT = 150
"""Seconds for a row."""


def main(
    benchmark: str,
    description: str | None,
    row: Callable[[str, str, bool], dict[str, Any]],
    cases: Sequence[str],
    implementations: Sequence[str],
    *,
    default: Sequence[str] | None = None,
) -> None:
    """Command line of the module `benchmarks.BENCHMARK`: one row per case and implementation, in that order.

    Args:
      benchmark: names the module and the result file.
      description: shown by `--help`.
      row: of a case and an implementation, and whether only errors are wanted; what the row has beside these names.
      cases: to choose from.
      implementations: likewise; all if none are named.
      default: cases if none are named; all of them if None.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*cases], default=[*(default or cases)])
    parser.add_argument("--implementations", nargs="+", choices=[*implementations], default=[*implementations])
    parser.add_argument("--check", action="store_true", help="only the errors")
    parser.add_argument("--row", nargs=2, help="a case and an implementation, in this process")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    given = parser.parse_args()
    if given.row is not None:
        case, name = given.row
        print(json.dumps(row(case, name, given.check)))
        return
    leave_the_device()
    common.write_rows(benchmark, rows(benchmark, given.cases, given.implementations, given.check), given.out)


def leave_the_device() -> None:
    """To be called before JAX is used, in a process that only asks the device for its name."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def environment() -> dict[str, str]:
    """Of a process that may have the device's memory to itself."""
    return {key: value for key, value in os.environ.items() if key != "XLA_PYTHON_CLIENT_PREALLOCATE"}


def rows(
    benchmark: str, cases: Sequence[str], implementations: Sequence[str], only_check: bool
) -> Iterator[dict[str, Any]]:
    """Runs the module once for each row, which begins with the names of case and implementation."""
    for case in cases:
        for name in implementations:
            begun: dict[str, Any] = {"name": case, "implementation": name}
            flags = ["--row", case, name, *["--check"] * only_check]
            command = [sys.executable, "-m", f"benchmarks.{benchmark}", *flags]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=LIMIT, env=environment()
                )
            except subprocess.TimeoutExpired:
                yield begun | {"error": f"no result in {LIMIT} s"}
                continue
            if done.returncode:
                said = done.stderr.partition("-" * 20)[0].strip()  # a remark on tracebacks
                yield begun | {"error": "\n".join(said.splitlines()[-3:])[-1000:]}
            else:
                yield begun | json.loads(done.stdout.splitlines()[-1])
