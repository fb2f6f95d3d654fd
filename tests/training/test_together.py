"""Several agents in one program: as if each were alone."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest
from fakes import AGENT, ScriptedEnv, init
from test_loop import FRAMES, PREDICTION, ListedCheckpoints, run_config

from drama_jax.config import ConfigError
from drama_jax.training import arrays, images, loop, programs, replay_log
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.member import Member
from drama_jax.training.together import Together
from tests.tools import metrics_but_for_the_clock

EPISODES = [[4], [7], [3]]
"""Lengths of the episodes of three agents' environments."""


@pytest.fixture(autouse=True)
def recording_agent(monkeypatch):
    monkeypatch.setattr(loop, "agent", AGENT)
    monkeypatch.setattr(programs, "agent", AGENT)
    monkeypatch.setattr(images, "pictures", lambda state, key: (FRAMES, PREDICTION[:, :1], PREDICTION))


def train(folder, environments, *, seeds=(0, 1, 2), steps=20, snapshots=None, stop=lambda: False):
    """The members' trainings, their checkpoints, and their lines of metrics.jsonl without the speed."""
    together = Together(len(environments))
    logs = [folder / str(index) for index in range(len(environments))]
    states = [init() for _ in environments]
    if snapshots is not None:
        small = init().replace(replay=replay_log.without_rows(init().replay))
        states = [arrays.from_host(small, one.device, "agent/").replace(replay=init().replay) for one in snapshots]
    members = []
    for log, environment, seed, snapshot in zip(logs, environments, seeds, snapshots or [None] * len(logs)):
        log.mkdir(exist_ok=True)
        writer = Writer(log, run_config(steps).logging)
        members.append(Member(environment, jax.random.key(seed), writer, ListedCheckpoints(), snapshot))
    result = loop.train_together(
        run_config(steps), members, together.stack(states), together, progress=Progress(1, False, ""), stop=stop
    )
    for member in members:
        member.writer.close()
    rows = [metrics_but_for_the_clock(log) for log in logs]
    return result, [member.checkpoints for member in members], rows


def test_each_of_several_agents_trains_as_if_it_were_alone(tmp_path):
    (tmp_path / "all").mkdir()
    together = train(tmp_path / "all", [ScriptedEnv(lengths) for lengths in EPISODES])
    for index, lengths in enumerate(EPISODES):
        (tmp_path / f"alone{index}").mkdir()
        alone = train(tmp_path / f"alone{index}", [ScriptedEnv(lengths)], seeds=(index,))
        wanted = dataclasses.replace(alone[0][0].state, replay=None)
        chex.assert_trees_all_equal(together[0][index].state, wanted)
        assert together[0][index].returns == alone[0][0].returns
        assert together[2][index] == alone[2][0]
        saved, wanted_saved = together[1][index], alone[1][0]
        assert [(one.step, one.end) for one in saved.snapshots] == [(8, 7), (16, 15), (20, 20)]
        for one, other in zip(saved.snapshots, wanted_saved.snapshots, strict=True):
            chex.assert_trees_all_equal(one.device, other.device)
            assert one.host.keys() == other.host.keys()
            assert one.header | {"seconds": 0} == other.header | {"seconds": 0}
        np.testing.assert_array_equal([row.frames for row in saved.rows], [row.frames for row in wanted_saved.rows])


@pytest.mark.parametrize("stop_after", [4, 8, 13])
def test_several_agents_go_on_as_if_nothing_had_been(tmp_path, stop_after):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", [ScriptedEnv(lengths) for lengths in EPISODES])
    asked = iter(range(1, 100))
    first = train(
        tmp_path / "parts",
        [ScriptedEnv(lengths) for lengths in EPISODES],
        stop=lambda: next(asked) == stop_after,
    )
    assert {training.stopped for training in first[0]} == {stop_after}
    snapshots = [checkpoints.snapshots[-1] for checkpoints in first[1]]
    rest = train(tmp_path / "parts", [ScriptedEnv(lengths) for lengths in EPISODES], snapshots=snapshots)
    for index in range(len(EPISODES)):
        chex.assert_trees_all_equal(rest[0][index].state, whole[0][index].state)
        assert rest[0][index].returns == whole[0][index].returns
        assert rest[2][index] == whole[2][index]


def test_an_agent_of_several_goes_on_alone(tmp_path):
    """Its snapshot is that of a run of its own."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", [ScriptedEnv(EPISODES[1])], seeds=(1,))
    asked = iter(range(1, 100))
    first = train(tmp_path / "parts", [ScriptedEnv(lengths) for lengths in EPISODES], stop=lambda: next(asked) == 9)
    (tmp_path / "rest").mkdir()
    snapshots = [first[1][1].snapshots[-1]]
    rest = train(tmp_path / "rest", [ScriptedEnv(EPISODES[1])], seeds=(1,), snapshots=snapshots)
    chex.assert_trees_all_equal(rest[0][0].state, whole[0][0].state)
    assert rest[0][0].returns == whole[0][0].returns


def test_one_emulator_that_fails_ends_all_and_all_can_go_on(tmp_path):
    """The others may have played a step that is not stored: their episodes are cut off there."""
    environments = [ScriptedEnv(lengths) for lengths in EPISODES]
    step, calls = environments[1].step, iter(range(1, 100))

    def failing(actions):
        if next(calls) == 11:
            raise RuntimeError("smoke")
        return step(actions)

    environments[1].step = failing
    (tmp_path / "first").mkdir()
    first = train(tmp_path / "first", environments)
    assert all("smoke" in training.fault for training in first[0])
    snapshots = [checkpoints.snapshots[-1] for checkpoints in first[1]]
    assert len({snapshot.step for snapshot in snapshots}) == 1
    (tmp_path / "rest").mkdir()
    rest = train(tmp_path / "rest", [ScriptedEnv(lengths) for lengths in EPISODES], snapshots=snapshots)
    for index, training in enumerate(rest[0]):
        assert int(training.state.count) == 20
        logged = len(first[1][index].rows) + len(rest[1][index].rows)
        assert logged == 20
        assert training.state.firsts[snapshots[0].end]  # the episode that was running is cut off


def test_agents_are_shared_out_evenly():
    with pytest.raises(ConfigError, match="3 agents cannot be shared out evenly to 2 devices"):
        Together(3, jax.devices() * 2)
