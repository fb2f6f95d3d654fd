"""Runs of a minute's work for a snail: the whole program at the smallest size, and what two of them have in common."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from drama_jax.training import checkpoint, config_file, programs, replay_log
from experiments import atari100k, atari_options, machine
from tests.tools import metrics_but_for_the_clock

STEPS, WARMUP, EVERY = 48, 14, 10
# The intervals of metrics and checkpoints do not fit each other, and the ring overwrites its oldest steps.
ARGUMENTS = f"""
--game Breakout --preset tiny --steps {STEPS} --eval-episodes 2 --compilation-cache None --evaluation.num-envs 2
--evaluation.max-episode-steps 9 --atari.max-episode-steps 13 --agent.warmup-steps {WARMUP} --agent.acting-context 4
--agent.replay.capacity 25
--agent.world-model.autoencoder.image-size 16 --agent.world-model.autoencoder.depths 2 4
--agent.world-model.autoencoder.categoricals 4 --agent.world-model.autoencoder.classes 4
--agent.world-model.batch-size 2 --agent.world-model.batch-length 6 --agent.world-model.head-units 8
--agent.world-model.backbone.num-layers 1 --agent.world-model.backbone.width 16
--agent.world-model.backbone.head-dim 8 --agent.world-model.backbone.chunk-size 8
--agent.imagination.batch-size 4 --agent.imagination.context-length 2 --agent.imagination.horizon 4
--agent.imagination.unroll 1 --agent.behaviour.actor-layers 1 --agent.behaviour.critic-layers 1
--agent.behaviour.actor-units 8 --agent.behaviour.critic-units 8
--logging.metrics-every 7 --logging.images-every 24 --logging.checkpoint-every {EVERY} --logging.no-progress
--logging.no-tensorboard
""".split()


def main(logdir: pathlib.Path, *more: str) -> int:
    """The program in this process."""
    return atari100k.main([*ARGUMENTS, "--logdir", str(logdir), *more])


def only_run(logdir: pathlib.Path) -> pathlib.Path:
    """The one run directory below `logdir`."""
    (directory,) = logdir.glob("*/*/seed*")
    return directory


def steps_saved(run: pathlib.Path) -> list[int]:
    """Steps of its complete checkpoints."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def final(run: pathlib.Path) -> dict[str, Any]:
    """All that a run ends with: every array of agent and loop, the replay, the emulator, and the scores."""
    identity = config_file.read(run)["id"]
    _, config = atari_options.parse(ARGUMENTS, "x")
    snapshot, segments = checkpoint.load(run, identity)
    template = programs.shapes(config.agent, 4).replay
    memory = replay_log.with_rows(run, segments, snapshot.end, replay_log.without_rows(template), template)
    rows = {name: np.asarray(getattr(memory, name)) for name in replay_log.Row._fields}
    result = json.loads((run / "scores.json").read_text())
    header = {name: value for name, value in snapshot.header.items() if name != "seconds"}
    host = {name: array for name, array in snapshot.host.items() if name != "step_seconds"}
    scores = {name: result[name] for name in ("evaluation_returns", "training_returns", "steps")}
    return {**snapshot.device, **host, **rows, "step": snapshot.step, "header": header, "scores": scores}


def assert_same(run: pathlib.Path, other: pathlib.Path) -> None:
    """Both ended with the same bits, and wrote the same metrics on the way."""
    one, two = final(run), final(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == two[name].dtype
            np.testing.assert_array_equal(value, two[name], err_msg=name)
        else:
            assert value == two[name], name
    assert metrics_but_for_the_clock(run) == metrics_but_for_the_clock(other)


class Killed(BaseException):
    """The end of the process, as far as that can be had within one."""


class Haunted:
    """An environment to which something happens before its n-th step (counting from 1, in this part of the run)."""

    def __init__(self, environment: Any, events: dict[int, Callable[[], None]]) -> None:
        self._environment, self._events, self._count = environment, events, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def step(self, actions: np.ndarray) -> Any:
        self._count += 1
        self._events.get(self._count, lambda: None)()
        return self._environment.step(actions)


@contextlib.contextmanager
def haunted(monkeypatch, events: dict[int, Callable[[], None]], *, evaluation: bool = False):
    """Lets `events` happen in the training environment, or in those of the evaluation."""
    make = machine.make_environment

    def made(*arguments, **options):
        environment = make(*arguments, **options)
        return Haunted(environment, events) if options.get("evaluation", False) == evaluation else environment

    with monkeypatch.context() as patch:
        patch.setattr(machine, "make_environment", made)
        yield


def die() -> None:
    """See `Killed`."""
    raise Killed
