"""What a save costs at step 2,000 and at step 100,000: seconds the loop waits, seconds until it is on disk, bytes.

    python -m benchmarks.checkpoint --steps 100000

Plays a real game at random through the real loop at preset xs, with frames of the real size and no update of the agent
(its optimisers hold noise instead), and saves at regular intervals. Then restores the last save.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import pathlib
import tempfile
import time
from typing import Any

import jax

from benchmarks.common import write_result
from drama_jax.config import preset
from drama_jax.envs import make_atari
from drama_jax.training import checkpoint, loop, programs, resume
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.logging import Progress, Writer

_SHOWN = (2_000, 4_000, 10_000, 20_000, 50_000, 100_000)


class Timed(Checkpoints):
    """Notes when a save began, when the loop went on, and when it had ended."""

    def __init__(self, run: pathlib.Path, capacity: int) -> None:
        super().__init__(run, "benchmark", capacity)
        self.rows: list[dict[str, Any]] = []
        self._run_directory = run
        self._began = 0.0

    def wait(self) -> None:
        """The loop waits for the previous save before it copies the state; that is not this save's time."""
        super().wait()
        self._began = time.perf_counter()

    def save(self, snapshot: Snapshot) -> None:
        """Called when the state has been copied to the host."""
        began = self._began
        super().save(snapshot)
        self.rows.append({"step": snapshot.step, "blocking_s": time.perf_counter() - began, "began": began})

    def _save(self, snapshot: Snapshot) -> None:
        super()._save(snapshot)
        # The loop appends the row before it waits for this thread; it may be a little later than a fast save.
        while not self.rows or self.rows[-1]["step"] != snapshot.step:
            time.sleep(0.001)
        row = self.rows[-1]
        row["until_saved_s"] = time.perf_counter() - row.pop("began")
        directory = self._run_directory / checkpoint.FOLDER / str(snapshot.step)
        row["state_bytes"] = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        row["replay_bytes"] = (self._run_directory / self._log.segments[-1].name).stat().st_size


def full_size(state: Any) -> Any:
    """The state with noise in place of the optimisers' zeros, which a compressor would make nothing of."""

    def noise(leaf: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape) if leaf.ndim else leaf

    def fill(part: Any) -> Any:
        return dataclasses.replace(part, opt_state=jax.tree.map(noise, part.opt_state))

    return dataclasses.replace(state, world_model=fill(state.world_model), behaviour=fill(state.behaviour))


def main() -> None:
    """Measures, prints and writes benchmarks/results/checkpoint-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", default="Breakout")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=2_000, help="steps between saves")
    parser.add_argument("--directory", type=pathlib.Path, help="on the disk to measure; a temporary one if left out")
    arguments = parser.parse_args()
    config = preset("xs")
    agent = dataclasses.replace(
        config.agent,
        warmup_steps=arguments.steps,
        replay=dataclasses.replace(config.agent.replay, capacity=max(100_001, arguments.steps + 1)),
    )
    logging = dataclasses.replace(
        config.logging, metrics_every=10**9, checkpoint_every=arguments.every, tensorboard=False
    )
    config = dataclasses.replace(config, agent=agent, logging=logging, steps=arguments.steps)
    environment = make_atari(arguments.game, config.atari, num_envs=1, image_size=64, seed=0)
    with contextlib.closing(environment), tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        run = pathlib.Path(name)
        importlib.import_module("orbax.checkpoint")  # seconds that the first save would be charged with
        checkpoints = Timed(run, agent.replay.capacity)
        with contextlib.closing(checkpoints), Writer(run, logging) as writer:
            state = full_size(programs.initial_state(jax.random.key(0), agent, environment.num_actions))
            progress = Progress(config.steps, True, "playing")
            loop.train(
                config, environment, state, jax.random.key(1), writer=writer, progress=progress, checkpoints=checkpoints
            )
        del state
        if checkpoints.error is not None:
            raise SystemExit(checkpoints.error)
        start = time.perf_counter()
        found = checkpoint.load(run, "benchmark")
        assert found is not None
        verified = time.perf_counter()
        jax.block_until_ready(resume.restored_state(run, config, environment.num_actions, *found))
        restored = time.perf_counter()
        environment.set_state(found[0].host["environment"].tobytes())
        after = {
            "restored_step": found[0].step,
            "verify_s": verified - start,
            "restore_s": restored - verified,
            "emulator_s": time.perf_counter() - restored,
        }
    rows = [row for row in checkpoints.rows if row["step"] in (*_SHOWN, config.steps)]
    write_result("checkpoint", [{"game": arguments.game, "every": arguments.every}, *rows, after])


if __name__ == "__main__":
    main()
