"""All benchmarks of a GPU, one after the other, within a time, each in a process of its own.

    python -m benchmarks.all --out results                    everything: an hour at most
    python -m benchmarks.all --out results --seconds 560      what fits; the same command goes on with what is left
    python -m benchmarks.all --out results --only update ssd  some of it

OUT has the result files, what each part printed (logs/PART.txt), and a file done/PART for each part that ended well,
which is then left alone: remove it to measure again. A part that fails, or takes longer than it may, does not keep the
others from running. Parts write their files as they go, so that what was measured before a time limit is kept.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

PARTS: dict[str, tuple[int, str]] = {
    "update": (180, "update_step"),
    "loop_cold": (240, "train_loop --backend ale --label _cold --steps 300"),
    "loop_warm": (180, "train_loop --backend ale --label _warm --steps 300"),
    "ssd": (420, "ssd --dtypes bfloat16 --lengths"),
    "strips": (300, "ssd --tune --strips --cases lm_2k lm_8k lm_64k --dtypes bfloat16"),
    "check": (180, "ssd --check --cases drama_train lm_2k lm_8k --dtypes bfloat16"),
    "lengths": (420, "ssd --cases"),
    "mosaic": (480, "ssd_mosaic"),
    "profile": (120, "profile_step"),
    "imagination": (120, "imagination"),
    "autoencoder": (300, "autoencoder"),
    "ssd_float32": (300, "ssd --dtypes float32 --lengths"),
    "conv_mosaic": (600, "conv_mosaic"),
    "seeds": (300, "multi_seed --presets xs"),
    "tiny": (150, "multi_seed --presets tiny"),
    "jax_env": (300, "jax_env"),
    "check_bfloat16": (600, "ssd --check --dtypes bfloat16"),
    "check_float32": (600, "ssd --check --dtypes float32"),
    "tune": (600, "ssd --tune"),
    "precision": (300, "precision --backend ale"),
}
"""Name -> the most seconds that it may take, and the benchmark with its flags; the most wanted first."""
LEAST = 30
"""Seconds below which nothing new is begun."""


def command(part: str, out: pathlib.Path) -> list[str]:
    """The command line of a part."""
    name, *flags = PARTS[part][1].split()
    return [sys.executable, "-m", f"benchmarks.{name}", *flags, "--out", str(out)]


def environment(part: str, out: pathlib.Path) -> dict[str, str]:
    """The variables of a part's process: parts share what is compiled, but the loop's first start finds nothing."""
    cache = out / ("compiled_loop" if part.startswith("loop") else "compiled")
    if part == "loop_cold":
        shutil.rmtree(cache, ignore_errors=True)
    return dict(os.environ) | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


def run(part: str, seconds: float, out: pathlib.Path) -> str:
    """Runs a part for at most so many seconds; returns how it ended: `done`, `failed` or `cut off`."""
    with (out / "logs" / f"{part}.txt").open("w") as log:
        process = subprocess.Popen(command(part, out), stdout=log, stderr=subprocess.STDOUT, env=environment(part, out))
        try:
            return "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "cut off"
        finally:  # also if this process is to end
            process.kill()
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is 0 if all parts that were asked for are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="in all")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no part is left running
    end = time.monotonic() + given.seconds
    for folder in ("logs", "done"):
        (given.out / folder).mkdir(parents=True, exist_ok=True)
    left = [part for part in given.only if not (given.out / "done" / part).exists()]
    for part in list(left):
        seconds = min(PARTS[part][0], end - time.monotonic())
        if seconds < LEAST:
            print(f"no time left for {', '.join(left)}; the same command goes on", flush=True)
            break
        start = time.monotonic()
        how = run(part, seconds, given.out)
        print(f"{part}: {how}, {time.monotonic() - start:.0f} s", flush=True)
        if how == "done":
            (given.out / "done" / part).touch()
            left.remove(part)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
