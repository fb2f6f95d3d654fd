"""The whole run on the device (`experiments.jax_env`): steps per second against the number of seeds.

    python -m benchmarks.jax_env                                Catch and MinAtar's Breakout, 1, 4 and 16 seeds of tiny
    python -m benchmarks.jax_env --envs Pendulum-v1 --seeds 5   some other
    python -m benchmarks.jax_env --presets small --steps 500    on a GPU

Times a chunk of training steps (environment, acting, replay, sampler, world model, imagination, behaviour, metrics) as
the command runs it, on one device, after one that compiled it. A step counts once for every seed. On a CPU the time
that the process was given is measured as well: where others use the machine, `steps_per_cpu_s` says what one core
alone would do, and `steps_per_s` what was left.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import common
from drama_jax.training import in_graph
from drama_jax.training.together import Together
from experiments import jax_options
from experiments.jax_env import Chunk

Row = dict[str, Any]


def measure(env: str, preset: str | None, seeds: int, steps: int) -> Row:
    """The row of one environment and number of seeds; `steps` timed steps of each."""
    chosen = [] if preset is None else ["--preset", preset]
    options, config, environment = jax_options.parse(["--env", env, *chosen])
    together = Together(seeds)
    # Run once, so that on a CPU it is compiled fast rather than well.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    begin = jax.jit(functools.partial(_filled, config, environment), compiler_options=quick)
    loop = together.stack([begin(jax.random.key(seed)) for seed in range(seeds)])
    chunk = Chunk(environment, random=False, steps=steps)
    program: Any = jax.jit(chunk, donate_argnums=0) if seeds == 1 else together.program(chunk, donated=True)
    start = time.perf_counter()
    loop, *_ = jax.block_until_ready(program(loop))
    first = time.perf_counter() - start
    start, spent = time.perf_counter(), time.process_time()
    jax.block_until_ready(program(loop))
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    return {
        "name": f"{env}, {seeds} seeds",
        "env": env,
        "preset": options.preset,
        "seeds": seeds,
        "steps_per_s": seeds * steps / seconds,
        "steps_per_cpu_s": seeds * steps / spent if jax.default_backend() == "cpu" else None,
        "ms_per_step": 1e3 * seconds / steps,
        "first_chunk_s": first,
        "steps": steps,
        **machine(),
    }


def _filled(config: Any, environment: Any, key: jax.Array) -> in_graph.Loop:
    """A loop after its warm-up."""
    loop, _ = in_graph.play_randomly(
        environment, config.agent.warmup_steps, in_graph.begin(config.agent, environment, key)
    )
    return loop


def machine() -> dict[str, Any]:
    """The processor, how many cores the process may use, and how many processes waited for the machine's."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a line per row, and writes the result file anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=["Catch-bsuite", "Breakout-MinAtar"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--presets", nargs="+", default=[None], help="the environment's own if not given")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of every seed")
    parser.add_argument("--out", type=pathlib.Path, help="directory of the result file")
    given = parser.parse_args(arguments)
    if min(*given.seeds, given.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    rows: list[Row] = []
    for env in given.envs:
        for preset in given.presets:
            for seeds in given.seeds:
                rows.append(measure(env, preset, seeds, given.steps))
                print(json.dumps(rows[-1]), flush=True)
                common.write_result("jax_env", rows, given.out, show=False)


if __name__ == "__main__":
    main()
