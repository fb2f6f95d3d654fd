"""Several seeds in one program: steps per second and memory against their number.

    python -m benchmarks.multi_seed --preset xs --seeds 1 2 5 12
    python -m benchmarks.multi_seed --picture benchmarks/results/multi_seed-xs-nvidia-h100-80gb-hbm3.json

Times the whole update (world model, imagination, behaviour) of `training.together` on states full of random frames,
queued as the training loop does. `ratio` is the time of a step of all seeds over that of one seed alone: at or under
the number of seeds, it pays to run them together. `peak_bytes` is the device's peak so far, so the numbers of seeds go
up; without it (on a CPU), `argument_bytes` and `temporary_bytes` are the compiler's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import common
from benchmarks.update_step import filled_state
from drama_jax import agent, replay
from drama_jax.config import PRESETS, AgentConfig, preset
from drama_jax.training.together import Together


def measure(config: AgentConfig, seeds: int, stored: int, repeats: int, devices: int) -> dict[str, Any]:
    """The row of `seeds` seeds."""
    together = Together(seeds, jax.local_devices()[:devices])
    states = []
    for index in range(seeds):
        with jax.default_device(together.device(index)):
            state = filled_state(config, min(stored, config.replay.capacity))
            states.append(dataclasses.replace(state, key=jax.random.key(index)))
    state = together.stack(states)
    del states
    shape = config.world_model.autoencoder.image_shape
    rows = np.zeros((seeds, *shape), np.uint8), np.zeros(seeds, np.int32), np.zeros(seeds, np.float32)
    flags = np.zeros(seeds, bool), np.zeros(seeds, bool)

    def one(state: Any, *arrays: jax.Array) -> Any:
        return agent.update(state, replay.Transition(*arrays))

    update: Any = jax.jit(lambda s, *a: one(s, *(x[0] for x in a)), donate_argnums=0)
    if seeds > 1:
        update = jax.jit(together.program(one), donate_argnums=0)
    start = time.perf_counter()
    compiled = update.lower(state, *rows, *flags).compile()
    compile_s = time.perf_counter() - start
    holder = [state]
    del state

    def call() -> Any:
        holder[0], metrics = compiled(holder[0], *rows, *flags)
        return metrics

    ms = common.queued_ms(call, repeats)
    memory = compiled.memory_analysis()
    return {
        "name": f"{seeds} seeds",
        "seeds": seeds,
        "devices": len(together.devices),
        "queued_ms": ms,
        "steps_per_s": 1e3 * seeds / ms,
        "compile_s": compile_s,
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def draw(path: pathlib.Path) -> pathlib.Path:
    """A picture of a result file, beside it."""
    from matplotlib.figure import Figure

    result = json.loads(path.read_text())
    rows = result["rows"]
    seeds = [row["seeds"] for row in rows]
    picture = Figure(figsize=(8, 3), layout="constrained")
    speed, memory = picture.subplots(1, 2)
    speed.plot(seeds, [row["steps_per_s"] for row in rows], "o-")
    speed.set_ylabel("steps per second, all seeds")
    sizes = [row["peak_bytes"] or row["argument_bytes"] + row["temporary_bytes"] for row in rows]
    memory.plot(seeds, [size / 1e9 for size in sizes], "o-")
    memory.set_ylabel("memory, GB")
    for axis in (speed, memory):
        axis.set_xlabel("seeds")
        axis.set_ylim(bottom=0)
    picture.suptitle(f"{result['benchmark']}, {result['device']}")
    target = path.with_suffix(".png")
    picture.savefig(target, dpi=110)
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 5, 12])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--stored", type=int, default=20_000, help="steps in each replay")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="directory of the result file")
    parser.add_argument("--picture", type=pathlib.Path, default=None, help="only draw this result file")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        print(draw(arguments.picture))
        return
    rows: list[dict[str, Any]] = []
    for seeds in arguments.seeds:
        row = measure(preset(arguments.preset).agent, seeds, arguments.stored, arguments.repeats, arguments.devices)
        row["ratio"] = row["queued_ms"] / rows[0]["queued_ms"] if rows else 1.0
        rows.append(row)
        print(row, flush=True)
    common.write_result(f"multi_seed-{arguments.preset}", rows, arguments.out)


if __name__ == "__main__":
    main()
