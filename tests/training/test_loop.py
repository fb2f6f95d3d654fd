"""The host loop against a scripted environment: what is stored, when, and what is reported."""

from __future__ import annotations

import dataclasses
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import AGENT, NUM_ACTIONS, ScriptedEnv, init

from drama_jax.config import RunConfig, preset
from drama_jax.training import arrays, clock, images, loop, programs, replay_log
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.logging import Progress, Writer
from drama_jax.training.replay_log import Row
from tests.tools import metrics_but_for_the_clock, metrics_lines

WARMUP = 6
EPISODE = 4
FRAMES = np.zeros((1, 3, 2, 2, 1), np.uint8)
PREDICTION = np.zeros((1, 3, 2, 2, 1), np.float32)


def run_config(steps: int, images_every: int = 1000) -> RunConfig:
    tiny = preset("tiny")
    model = dataclasses.replace(tiny.agent.world_model, batch_size=2, batch_length=2)
    imagination = dataclasses.replace(tiny.agent.imagination, batch_size=2, context_length=2)
    agent = dataclasses.replace(tiny.agent, world_model=model, imagination=imagination, warmup_steps=WARMUP)
    logging = dataclasses.replace(
        tiny.logging, metrics_every=5, images_every=images_every, checkpoint_every=8, tensorboard=False
    )
    return dataclasses.replace(tiny, agent=agent, logging=logging, steps=steps)


class ListedCheckpoints:
    """Remembers what was saved."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.rows: list[Row] = []
        self.saved: int | None = None

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def save(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        self.saved = snapshot.step

    def wait(self) -> None:
        pass


def train(
    tmp_path,
    monkeypatch,
    env,
    steps=20,
    checkpoints=None,
    on_measured=lambda seconds, left: None,
    state=None,
    snapshot=None,
    stop=lambda: False,
    images_every=1000,
):
    monkeypatch.setattr(loop, "agent", AGENT)
    monkeypatch.setattr(programs, "agent", AGENT)
    monkeypatch.setattr(images, "pictures", lambda state, key: (FRAMES, PREDICTION[:, :1], PREDICTION))
    with Writer(tmp_path, run_config(steps).logging) as writer:
        progress = Progress(steps, False, "training")
        return loop.train(
            run_config(steps, images_every),
            env,
            init() if state is None else state,
            jax.random.key(0),
            writer=writer,
            progress=progress,
            checkpoints=checkpoints,
            on_measured=on_measured,
            snapshot=snapshot,
            stop=stop,
        )


def test_transitions_pair_the_frame_before_the_action_with_the_reward_after_it(tmp_path, monkeypatch):
    env = ScriptedEnv([EPISODE])
    state = train(tmp_path, monkeypatch, env).state
    count = int(state.count)
    assert count == 20 == len(env.rows)
    # Frame numbers: 1 is the reset; an episode's frames are n..n+4, of which the last is never acted on.
    frames = [5 * episode + 1 + t for episode in range(5) for t in range(EPISODE)]
    np.testing.assert_array_equal(state.frames[:count], frames)
    np.testing.assert_array_equal(state.firsts[:count], [t == 0 for _ in range(5) for t in range(EPISODE)])
    np.testing.assert_array_equal(state.rewards[:count], [row["reward"] for row in env.rows])
    np.testing.assert_array_equal(state.terminals[:count], [row["terminal"] for row in env.rows])
    np.testing.assert_array_equal(state.actions[:count], [row["action"] for row in env.rows])
    assert [row["frame"] for row in env.rows] == [frame + 1 for frame in frames]


def test_the_policy_acts_on_the_current_frame_after_the_warm_up(tmp_path, monkeypatch):
    state = train(tmp_path, monkeypatch, ScriptedEnv([EPISODE])).state
    policy = np.asarray(state.frames) % NUM_ACTIONS
    np.testing.assert_array_equal(state.actions[WARMUP:20], policy[WARMUP:20])
    assert (np.asarray(state.actions[:WARMUP]) != policy[:WARMUP]).any()
    np.testing.assert_array_equal(state.trained[:20], np.arange(20) >= WARMUP)


def test_a_truncated_episode_is_not_terminal(tmp_path, monkeypatch):
    result = train(tmp_path, monkeypatch, ScriptedEnv([EPISODE], truncating=(0,)))
    assert not np.asarray(result.state.terminals).any()
    np.testing.assert_array_equal(result.state.firsts[:20], [t == 0 for _ in range(5) for t in range(EPISODE)])
    assert len(result.returns) == 5


def test_returns_include_the_reward_of_the_last_step(tmp_path, monkeypatch):
    result = train(tmp_path, monkeypatch, ScriptedEnv([EPISODE]))
    assert result.returns == [(4, 104.0), (8, 104.0), (12, 104.0), (16, 104.0), (20, 104.0)]
    lines = metrics_lines(tmp_path)
    episodes = [line for line in lines if "charts/episodic_return" in line]
    assert [(line["step"], line["charts/episodic_return"]) for line in episodes] == result.returns
    assert {line["charts/episodic_length"] for line in episodes} == {4.0}


def test_the_update_with_the_previous_transition_starts_before_the_emulator(tmp_path, monkeypatch):
    env = ScriptedEnv([100])

    def log(name: str, label: str) -> None:
        function = getattr(programs, name)

        def logged(*arguments):
            env.events.append(label)
            return function(*arguments)

        monkeypatch.setattr(programs, name, logged)

    log("act", "act")
    log("update", "update")
    log("observe", "observe")
    train(tmp_path, monkeypatch, env, steps=WARMUP + 3)
    warm_up = ["step", *["observe", "step"] * (WARMUP - 1)]
    assert env.events == [
        *warm_up,
        "act",
        "observe",
        "step",
        "act",
        "update",
        "step",
        "act",
        "update",
        "step",
        "update",
    ]


def test_metrics_are_means_over_the_interval(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, ScriptedEnv([100]), steps=20)
    lines = metrics_lines(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    # Transition k = 0, 1, ... has loss k. After s steps the agent has been given s - 1 transitions, at the end all.
    assert losses == {10: np.mean([6, 7, 8]), 15: np.mean([9, 10, 11, 12, 13]), 20: np.mean([14, 15, 16, 17, 18, 19])}
    assert all(line["charts/SPS"] > 0 for line in lines if "replay/size" in line)


def test_checkpoints_are_saved_at_intervals_and_at_the_end(tmp_path, monkeypatch):
    checkpoints = ListedCheckpoints()
    train(tmp_path, monkeypatch, ScriptedEnv([EPISODE]), steps=20, checkpoints=checkpoints)
    assert [(saved.step, saved.end) for saved in checkpoints.snapshots] == [(8, 7), (16, 15), (20, 20)]
    assert [int(saved.device["agent/count"]) for saved in checkpoints.snapshots] == [7, 15, 20]


def test_the_speed_is_reported_once_after_the_first_measured_updates(tmp_path, monkeypatch, capsys):
    calls = []

    def on_measured(seconds, steps_left):
        calls.append((seconds > 0, steps_left))
        return "this will take a while"

    train(tmp_path, monkeypatch, ScriptedEnv([EPISODE]), steps=30, on_measured=on_measured)
    assert calls == [(True, 30 - (WARMUP + 1 + 4))]
    assert capsys.readouterr().err.count("this will take a while") == 1


@pytest.mark.parametrize("steps", [0, 1, WARMUP])
def test_runs_too_short_for_an_update_end_well(tmp_path, monkeypatch, steps):
    result = train(tmp_path, monkeypatch, ScriptedEnv([EPISODE]), steps=steps)
    assert int(result.state.count) == steps
    assert result.ms_per_step is None


def continued(tmp_path, monkeypatch, snapshot, steps=20, lost=False, environment=ScriptedEnv):
    """The rest of a run, with a fresh agent and environment."""
    env = environment([EPISODE])
    env.lost = lost
    small = init().replace(replay=replay_log.without_rows(init().replay))
    state = arrays.from_host(small, snapshot.device, "agent/").replace(replay=init().replay)
    checkpoints = ListedCheckpoints()
    result = train(tmp_path, monkeypatch, env, steps, checkpoints, state=state, snapshot=snapshot)
    return result, env, checkpoints


@pytest.mark.parametrize("stop_after", [2, 4, WARMUP, 8, 11, 12, 19, 20])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, stop_after):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(tmp_path / "whole", monkeypatch, ScriptedEnv([EPISODE]), checkpoints=ListedCheckpoints())
    first, asked = ListedCheckpoints(), iter(range(1, 100))
    stopped = train(
        tmp_path / "parts",
        monkeypatch,
        ScriptedEnv([EPISODE]),
        checkpoints=first,
        stop=lambda: next(asked) == stop_after,
    )
    assert stopped.stopped == stop_after and first.snapshots[-1].step == stop_after
    # One save where a periodic one falls on the same step.
    assert [saved.step for saved in first.snapshots] == sorted({*range(8, stop_after + 1, 8), stop_after})
    result, env, rest = continued(tmp_path / "parts", monkeypatch, first.snapshots[-1])
    jax.tree.map(np.testing.assert_array_equal, result.state, whole.state)
    assert result.returns == whole.returns and result.stopped is None
    assert len(env.rows) == 20 - stop_after
    assert result.wall_clock_s > result.this_part_s
    assert metrics_but_for_the_clock(tmp_path / "whole") == metrics_but_for_the_clock(tmp_path / "parts")
    # Every step is in the log of rows once, in order.
    logged = [row.frames[0, 0, 0, 0] for row in first.rows + rest.rows]
    np.testing.assert_array_equal(logged, whole.state.frames[:20])


def test_act_is_given_the_context_to_keep(monkeypatch):
    """Its arrays stay where they are: on a GPU less of the program has to be written anew for the next step."""
    monkeypatch.setattr(programs, "agent", AGENT)
    acting, first = AGENT.initial_acting(init(), 1), jnp.ones(1, bool)
    frames = jnp.zeros((1, *ScriptedEnv.frame_shape), jnp.uint8)
    _, later = programs.act(init(), acting, frames, jax.random.key(0), 3, first)
    assert acting["steps"].is_deleted() and int(later["steps"][0]) == 1


def test_the_clock_of_the_metrics_stands_still_between_two_parts(tmp_path, monkeypatch):
    now = 0.0

    class Slow(ScriptedEnv):
        """A step, or the call that resets after an episode's last, takes a second."""

        def step(self, actions):
            nonlocal now
            now += 1
            return super().step(actions)

    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: now))
    first, asked = ListedCheckpoints(), iter(range(1, 100))
    train(tmp_path, monkeypatch, Slow([EPISODE]), checkpoints=first, stop=lambda: next(asked) == 11)
    now += 1000
    result, _, _ = continued(tmp_path, monkeypatch, first.snapshots[-1], environment=Slow)
    lines = metrics_lines(tmp_path)
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12, 15, 16, 20, 20]
    assert all(line["seconds"] == line["step"] + line["step"] // EPISODE for line in lines)
    assert (result.wall_clock_s, result.this_part_s) == (25, 12)


def test_where_the_environment_is_lost_the_episode_is_cut(tmp_path, monkeypatch):
    first, asked = ListedCheckpoints(), iter(range(1, 100))
    train(tmp_path, monkeypatch, ScriptedEnv([EPISODE]), checkpoints=first, stop=lambda: next(asked) == 10)
    result, _, _ = continued(tmp_path, monkeypatch, first.snapshots[-1], lost=True)
    firsts = np.flatnonzero(result.state.firsts[:20])
    np.testing.assert_array_equal(firsts, [0, 4, 8, 10, 14, 18])
    assert not result.state.terminals[9] and int(result.state.count) == 20
    assert [step for step, _ in result.returns] == [4, 8, 14, 18]
    assert {value for _, value in result.returns} == {104.0}


@pytest.mark.parametrize("call", [1, 5, 9, 10, 13])
def test_an_emulator_that_fails_leaves_a_run_that_can_go_on(tmp_path, monkeypatch, call):
    """Call 5 is a reset after an episode's end, call 10 too."""
    env, checkpoints = ScriptedEnv([EPISODE]), ListedCheckpoints()
    step, calls = env.step, iter(range(1, 100))

    def failing(actions):
        if next(calls) == call:
            raise RuntimeError("smoke")
        return step(actions)

    env.step = failing
    result = train(tmp_path, monkeypatch, env, checkpoints=checkpoints)
    assert "smoke" in result.fault and result.stopped is None
    if call == 1:
        assert checkpoints.snapshots == []
        return
    done = checkpoints.snapshots[-1].step
    assert f"in step {done}:" in result.fault and len(checkpoints.rows) == checkpoints.snapshots[-1].end == done
    # An emulator that failed may be within a step, and one that fails in a certain place would do so again.
    assert "environment" not in checkpoints.snapshots[-1].host
    rest, _, more = continued(tmp_path, monkeypatch, checkpoints.snapshots[-1])
    assert int(rest.state.count) == 20 and len(checkpoints.rows) + len(more.rows) == 20
    assert rest.state.firsts[done] and not rest.state.firsts[done + 1]


def test_the_loop_goes_on_while_images_are_written(tmp_path, monkeypatch):
    env, played, written = ScriptedEnv([EPISODE]), threading.Event(), []
    step = env.step

    def stepping(actions):
        if len(env.events) == 14:
            played.set()
        return step(actions)

    def write(writer, steps_done, *pictures):
        written.append((steps_done, played.wait(10)))

    env.step = stepping
    monkeypatch.setattr(images, "write", write)
    train(tmp_path, monkeypatch, env, images_every=10)
    assert written == [(10, True), (20, True)]


def test_a_fault_while_images_are_written_is_not_lost(tmp_path, monkeypatch):
    def write(writer, steps_done, *pictures):
        raise ZeroDivisionError(f"in the images of step {steps_done}")

    monkeypatch.setattr(images, "write", write)
    checkpoints = ListedCheckpoints()
    with pytest.raises(ZeroDivisionError, match="in the images of step 20"):
        train(tmp_path, monkeypatch, ScriptedEnv([EPISODE]), checkpoints=checkpoints)
    assert checkpoints.saved == 20
