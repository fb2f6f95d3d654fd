"""Several seeds in one program: steps per second and memory against their number.

    python -m benchmarks.multi_seed                             presets xs and tiny on one GPU, every bar but the last
    python -m benchmarks.multi_seed --presets tiny --seeds 1 16     some of it
    python -m benchmarks.multi_seed --devices 2                 five seeds on one GPU, ten on two
    python -m benchmarks.multi_seed --seconds 300               begins nothing new after five minutes
    python -m benchmarks.multi_seed --picture                   draws the result files of this device (needs matplotlib)

Times the whole update (world model, imagination, behaviour) of `training.together` on states full of random frames,
queued as the training loop does; the emulators are not part of it. It answers these bars, and prints each beside what
was measured:

* preset xs: a step of five seeds takes at most 5.0 times that of one (aim: 4);
* preset xs: twelve seeds fit in 80 GB, replays of full size included;
* preset tiny: a step of sixteen seeds takes at most 3.0 times that of one;
* two GPUs of a host train at least 1.9 times the seeds per hour of one, each with as many seeds as the one.

`ratio` is the time of a step of all seeds over that of one seed alone: at or under the number of seeds, it pays to run
them together. Each number of seeds is measured in a process of its own: one that has held others before leaves its
memory in pieces, and twelve seeds then do not fit. `peak_bytes` is the largest of the devices' peaks, and
`compiled_bytes` the compiler's own count per device, on a CPU the only one. The result file is written anew after every
number of seeds, so that a run which is cut off has lost nothing but the one under way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common, processes
from benchmarks.update_step import filled_state
from drama_jax import agent, replay
from drama_jax.config import PRESETS, AgentConfig, preset
from drama_jax.training.together import Together
from experiments import machine

SEEDS = {"xs": [1, 2, 5, 12], "tiny": [1, 4, 16]}
OTHER_SEEDS = [1, 2, 5]
RATIO_BARS = {("xs", 5): 5.0, ("tiny", 16): 3.0}
MEMORY_BARS = {("xs", 12): 80e9}
DEVICES_BAR = 1.9
"""For two of them."""
_FIRST = 3
"""Updates from which the time of the others is foreseen."""
Row = dict[str, Any]


def measure(config: AgentConfig, seeds: int, devices: int, stored: int, repeats: int, until: float) -> Row:
    """The row of `seeds` seeds on `devices` devices; timed for `repeats` steps, or for fewer where the time is up."""
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

    ms, timed = _queued_ms(call, repeats, until)
    peaks = [stats["peak_bytes_in_use"] for device in together.devices if (stats := device.memory_stats())]
    memory = compiled.memory_analysis()
    return {
        "name": f"{seeds} seeds on {devices} devices",
        "seeds": seeds,
        "devices": devices,
        "queued_ms": ms,
        "repeats": timed,
        "steps_per_s": 1e3 * seeds / ms,
        "compile_s": compile_s,
        "peak_bytes": max(peaks, default=None),
        "compiled_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }


def _queued_ms(call: Callable[[], Any], repeats: int, until: float) -> tuple[float, int]:
    """Mean milliseconds of queued calls, and of how many: fewer than `repeats` if they would end after `until`."""
    jax.block_until_ready(call())
    first = common.queued_ms(call, _FIRST, warmup=0)
    repeats = int(min(repeats, 1e3 * (until - time.monotonic()) / first))
    if repeats <= _FIRST:
        return first, _FIRST
    return common.queued_ms(call, repeats, warmup=0), repeats


def cases(seeds: Sequence[int], devices: int) -> list[tuple[int, int]]:
    """(seeds, devices) to measure: on several devices, as many seeds on each as on one."""
    if devices == 1:
        return [(count, 1) for count in sorted(seeds)]
    return [(count * number, number) for count in sorted(seeds) for number in (1, devices)]


def measured(arguments: argparse.Namespace, name: str, seeds: int, devices: int, until: float) -> Row | None:
    """`measure` in a process of its own; None if the seeds do not fit."""
    flags = ["--alone", "--presets", name, "--seeds", str(seeds), "--devices", str(devices)]
    flags += ["--repeats", str(arguments.repeats), "--stored", str(arguments.stored)]
    flags += ["--seconds", str(until - time.monotonic())]
    command = [sys.executable, "-m", "benchmarks.multi_seed", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=processes.environment())
    if done.returncode:
        if "RESOURCE_EXHAUSTED" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def run(arguments: argparse.Namespace, name: str, until: float) -> None:
    """All cases of one preset, with a result file that grows."""
    benchmark = f"multi_seed-{name}" if arguments.devices == 1 else f"multi_device-{name}"
    default = SEEDS.get(name, OTHER_SEEDS) if arguments.devices == 1 else [5]
    rows: list[Row] = []
    for seeds, devices in cases(arguments.seeds or default, arguments.devices):
        if time.monotonic() > until:
            print(f"{benchmark}: no time left for {seeds} seeds on {devices} devices", flush=True)
            break
        row = measured(arguments, name, seeds, devices, until)
        if row is None:
            print(f"{benchmark}: {seeds} seeds on {devices} devices do not fit", flush=True)
            break
        row["preset"] = name
        rows.append(row)
        alone = next((one for one in rows if one["seeds"] == 1), None)
        row["ratio"] = row["queued_ms"] / alone["queued_ms"] if alone else None
        print(json.dumps(row), flush=True)
        common.write_result(benchmark, rows, arguments.out, show=False)
    for line in answers(name, rows):
        print(line, flush=True)


def answers(name: str, rows: Sequence[Row]) -> list[str]:
    """A line for every bar that the rows of a preset answer: bar and measured."""
    lines = []
    for row in rows:
        ratio, fits = RATIO_BARS.get((name, row["seeds"])), MEMORY_BARS.get((name, row["seeds"]))
        if row["devices"] == 1 and ratio and row["ratio"]:
            what = f"{name}, {row['seeds']} seeds: times one seed's step"
            lines.append(_answer(what, f"<= {ratio}", f"{row['ratio']:.2f}", row["ratio"] <= ratio))
        if row["devices"] == 1 and fits:
            size, source = (row["peak_bytes"], "peak") if row["peak_bytes"] else (row["compiled_bytes"], "compiled")
            what = f"{name}, {row['seeds']} seeds: GB of memory, {source}"
            lines.append(_answer(what, f"<= {fits / 1e9:.0f}", f"{size / 1e9:.1f}", size <= fits))
    for row, times in speedups(rows):
        what = f"{name}, {row['seeds']} seeds: times the steps/s of one device with {row['seeds'] // row['devices']}"
        if row["devices"] == 2:
            lines.append(_answer(what, f">= {DEVICES_BAR}", f"{times:.2f}", times >= DEVICES_BAR))
        else:
            lines.append(f"{what}: {times:.2f} on {row['devices']} devices")
    return lines


def speedups(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows of several devices, with their steps/s over those of one device with as many seeds as each of them has."""
    one = {row["seeds"]: row["steps_per_s"] for row in rows if row["devices"] == 1}
    several = [row for row in rows if row["devices"] > 1 and row["seeds"] // row["devices"] in one]
    return [(row, row["steps_per_s"] / one[row["seeds"] // row["devices"]]) for row in several]


def _answer(what: str, bar: str, measured: str, met: bool) -> str:
    return f"{what}: bar {bar}, measured {measured}: {'met' if met else 'NOT MET'}"


def draw(directory: pathlib.Path, device: str) -> pathlib.Path:
    """One picture of the device's result files, both presets, beside them."""
    from matplotlib.figure import Figure

    results = {name: directory / f"multi_seed-{name}-{device}.json" for name in PRESETS}
    found = {name: json.loads(path.read_text()) for name, path in results.items() if path.exists()}
    if not found:
        raise SystemExit(f"error: {directory} has no multi_seed-*-{device}.json; run python -m benchmarks.multi_seed")
    picture = Figure(figsize=(9, 3 * len(found)), layout="constrained")
    for (name, result), (speed, memory) in zip(found.items(), picture.subplots(len(found), 2, squeeze=False)):
        rows = result["rows"]
        seeds = [row["seeds"] for row in rows]
        speed.plot(seeds, [row["steps_per_s"] for row in rows], "o-", label="in one program")
        speed.axhline(rows[0]["steps_per_s"], linestyle=":", label=f"{seeds[0]} alone")
        memory.plot(seeds, [(row["peak_bytes"] or row["compiled_bytes"]) / 1e9 for row in rows], "o-")
        speed.set(xlabel="seeds", ylabel="steps per second, all seeds", title=name)
        memory.set(xlabel="seeds", ylabel="memory, GB", title=name)
        speed.legend()
        for axis in (speed, memory):
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    picture.suptitle(next(iter(found.values()))["device"])
    target = directory / f"multi_seed-{device}.png"
    picture.savefig(target, dpi=110)
    return target


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", choices=list(PRESETS), nargs="+", default=["xs", "tiny"])
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="on one device each; 1 first, for the ratio")
    parser.add_argument("--devices", type=int, default=1, help="above 1: this many against one")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--stored", type=int, default=20_000, help="steps in each replay")
    parser.add_argument("--out", type=pathlib.Path, default=common.RESULTS, help="directory of the result files")
    parser.add_argument("--alone", action="store_true", help="one number of seeds, in this process; prints its row")
    parser.add_argument("--picture", action="store_true", help="only draw the result files")
    parser.add_argument("--device", default=None, help="whose result files to draw, as in their names; this one's")
    arguments = parser.parse_args()
    if arguments.alone:
        machine.set_xla_flags(deterministic=False, agents=arguments.seeds[0])  # as a run does
    else:
        processes.leave_the_device()
    if arguments.picture:
        print(draw(arguments.out, arguments.device or common.device_slug()))
        return
    if not 1 <= arguments.devices <= len(jax.local_devices()):
        raise SystemExit(f"error: --devices {arguments.devices}: there are {len(jax.local_devices())} here")
    until = time.monotonic() + arguments.seconds
    if arguments.alone:
        (name,), (seeds,) = arguments.presets, arguments.seeds
        config = preset(name).agent
        print(json.dumps(measure(config, seeds, arguments.devices, arguments.stored, arguments.repeats, until)))
        return
    for name in arguments.presets:
        run(arguments, name, until)


if __name__ == "__main__":
    main()
