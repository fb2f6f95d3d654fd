"""The real training loop with the real emulator: steps per second, and who waits for whom.

    python -m benchmarks.train_loop --preset xs --game Breakout --backend ale

Runs `training.loop.train` as `experiments.atari100k` does, logging and checkpoints included, for `--steps` updates.
Rows: `first_update_s` from the start to the end of the first updates, the warm-up steps included (run it twice with
`JAX_COMPILATION_CACHE_DIR` set for the time with a warm cache), and how much of it went into making the programs;
the median step; the share of the wall clock in which the emulator plays, and that in which the device is idle, the
latter from a profile of some of the last steps, which the profiler itself slows down: an upper bound.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import common
from drama_jax.config import PRESETS, RunConfig, preset
from drama_jax.envs import Env, make_atari
from drama_jax.training import loop, programs
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.logging import Progress, Writer
from experiments import machine

TRACED = 20
SHOWN = 6
"""Programs whose times are in the row."""


class Watched:
    """An environment that notes when its steps begin and end, and traces the device for `TRACED` of the last ones."""

    def __init__(self, environment: Env, steps: int, trace: pathlib.Path) -> None:
        self._environment, self._steps, self._trace = environment, steps, trace
        self.begins: list[float] = []
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def step(self, actions: np.ndarray) -> Any:
        """See `envs.base.Env`."""
        if jax.default_backend() != "cpu":
            if len(self.begins) == self._steps - TRACED - 4:
                jax.profiler.start_trace(str(self._trace))
            if len(self.begins) == self._steps - 4:
                jax.profiler.stop_trace()
        self.begins.append(time.perf_counter())
        observation = self._environment.step(actions)
        self.seconds.append(time.perf_counter() - self.begins[-1])
        return observation


EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "compile_s",
}
"""Of `jax.monitoring`, and what we call their times."""


class Made:
    """Notes how long JAX takes to trace, lower and compile (or to load) each program that is made inside of it."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] = {}

    def _note(self, event: str, duration_secs: float, **about: Any) -> None:
        if event in EVENTS and "fun_name" in about:
            name = about["fun_name"].removeprefix("jit(").removesuffix(")")
            program = self._seconds.setdefault(name, dict.fromkeys(EVENTS.values(), 0.0))
            program[EVENTS[event]] += duration_secs

    def __enter__(self) -> Made:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def programs(self) -> dict[str, dict[str, float]]:
        """Seconds by program, the slowest first; functions that were only traced are part of those that call them."""
        whole = {name: program for name, program in self._seconds.items() if program["compile_s"]}
        return dict(sorted(whole.items(), key=lambda item: -sum(item[1].values())))


def busy_share(trace: pathlib.Path) -> float | None:
    """Share of the time between the first and the last kernel in which some kernel runs; None without a trace."""
    intervals = []
    for path in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "/device:" not in plane.name:
                continue
            for line in (line for line in plane.lines if "Stream" in line.name):
                intervals += [(event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
    if not intervals:
        return None
    intervals.sort()
    busy, end = 0.0, intervals[0][0]
    for begin, finish in intervals:
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return busy / (end - intervals[0][0])


def measure(config: RunConfig, game: str, folder: pathlib.Path) -> dict[str, Any]:
    """One run; the row of the result."""
    start = time.perf_counter()
    warmup, trace = config.agent.warmup_steps, folder / "trace"
    image_size = config.agent.world_model.autoencoder.image_size
    environment = make_atari(game, config.atari, num_envs=1, image_size=image_size, seed=config.seed)
    with (
        Made() as made,
        contextlib.closing(environment),
        Writer(folder, config.logging) as writer,
        contextlib.closing(Checkpoints(folder, "benchmark", config.agent.replay.capacity)) as checkpoints,
        contextlib.closing(Progress(config.steps, config.logging.progress, "training")) as progress,
    ):
        watched: Any = Watched(environment, config.steps, trace)
        state = programs.initial_state(jax.random.key(0), config.agent, environment.num_actions)
        first_update: dict[str, Any] = {}

        def on_measured(seconds: float, left: int) -> None:
            del seconds, left
            programs = made.programs()
            first_update["first_update_s"] = time.perf_counter() - start
            first_update["made_s"] = sum(sum(program.values()) for program in programs.values())
            first_update["programs"] = dict(list(programs.items())[:SHOWN])

        training = loop.train(
            config,
            watched,
            state,
            jax.random.key(1),
            writer=writer,
            progress=progress,
            checkpoints=checkpoints,
            on_measured=on_measured,
        )
    untraced = slice(warmup + 10, config.steps - TRACED - 6)
    begins, played = np.diff(watched.begins)[untraced], np.asarray(watched.seconds)[untraced]
    busy = busy_share(trace)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        **first_update,
        "ms_per_step": training.ms_per_step,
        "steps_per_s": 1 / float(begins.mean()),
        "p95_ms": 1e3 * float(np.quantile(begins, 0.95)),
        "emulator_share": float(played.sum() / begins.sum()),
        "device_idle_share_traced": None if busy is None else 1 - busy,
        "peak_device_bytes": stats.get("peak_bytes_in_use"),
        "updates": config.steps - warmup,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--game", default="Breakout")
    parser.add_argument("--backend", choices=("envpool", "ale"), default="envpool")
    parser.add_argument("--steps", type=int, default=1_000, help="updates; the warm-up steps come on top")
    parser.add_argument("--label", default="", help="appended to the row's name")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    machine.set_xla_flags(deterministic=False)  # as a run does
    config = preset(arguments.preset)
    config = dataclasses.replace(
        config,
        atari=dataclasses.replace(config.atari, backend=arguments.backend),
        steps=config.agent.warmup_steps + arguments.steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        row = measure(config, arguments.game, pathlib.Path(folder))
    name = f"train_loop{arguments.label}"
    row = {"name": name, "preset": arguments.preset, "game": arguments.game, "backend": arguments.backend, **row}
    common.write_result(f"{name}-{arguments.preset}", [row], arguments.out)


if __name__ == "__main__":
    main()
