"""Updates that are not finite: each is skipped and counted, and too many in a row end the run with their batch."""

import numpy as np
import pytest
from micro import main, only_run, steps_saved

from drama_jax import replay
from drama_jax.agent import AgentState
from drama_jax.guard import Guard
from drama_jax.training import checkpoint, config_file, watch
from experiments import machine
from tests.tools import metrics_lines


class Poisoned:
    """An environment whose rewards are NaN from the n-th step on."""

    def __init__(self, environment, after):
        self._environment, self._left = environment, after

    def __getattr__(self, name):
        return getattr(self._environment, name)

    def step(self, actions):
        self._left -= 1
        observation = self._environment.step(actions)
        return observation if self._left >= 0 else observation._replace(rewards=np.full(1, np.nan, np.float32))


def test_too_many_in_a_row_end_the_run_with_a_checkpoint_and_their_batch(tmp_path, monkeypatch, capsys):
    make = machine.make_environment
    monkeypatch.setattr(machine, "make_environment", lambda *args, **options: Poisoned(make(*args, **options), 16))
    assert main(tmp_path, "--max-skipped-updates", "5") == 1
    run = only_run(tmp_path)
    error = capsys.readouterr().err
    (file,) = run.glob("not-finite-*.npz")
    assert error.startswith("error: loss or gradient were not finite in the last ") and error.count("\n") == 1
    assert str(file) in error and "max_skipped_updates is 5" in error

    (stopped,) = (int(part) for part in [file.stem.rpartition("-")[2]])
    assert stopped == steps_saved(run)[-1] < 48
    with np.load(file, allow_pickle=False) as batch:
        assert batch["frames"].shape == (2, 6, 16, 16, 3) and batch["slots"].shape == (2,)
        assert np.isnan(batch["rewards"]).any()
    last = metrics_lines(run)[-1]
    assert last["guard/skipped_in_a_row"] >= 5 and last["guard/skipped_world_model_updates"] >= 5
    snapshot, _ = checkpoint.load(run, config_file.read(run)["id"])
    learnt = {name: array for name, array in snapshot.device.items() if name.startswith("agent/world_model/params")}
    assert learnt and all(np.isfinite(array).all() for array in learnt.values())


def test_checked_runs_are_ordinary_runs(tmp_path):
    assert main(tmp_path, "--check", "--steps", "18", "--eval-episodes", "0") == 0


def test_a_broken_invariant_is_an_assertion():
    class Memory:
        size, position, capacity = np.int32(3), np.int32(4), 10
        counters = replay.dfs.Counters(trained=np.zeros(10, np.int32), imagined=np.zeros(10, np.int32))

    state = AgentState(*(None,) * 2, Memory, *(None,) * 5)
    with pytest.raises(AssertionError):
        watch.check_invariants(state, 4)
    Memory.size = np.int32(4)
    watch.check_invariants(state, 4)
    Memory.counters.imagined[7] = 1
    with pytest.raises(AssertionError, match="imagined draws counted for steps that are not stored"):
        watch.check_invariants(state, 4)


def test_a_batch_is_kept_only_if_the_world_model_was_skipped_last():
    class State:
        guard = Guard(skipped=np.array([3, 9]), in_a_row=np.array([0, 9]), slots=np.array([1, 2]))

    assert watch.skipped_batch(State) is None


def test_the_limit_is_the_number_of_skipped_updates():
    watch.check_skipped(4, 5)
    with pytest.raises(watch.NotFiniteError, match="in the last 5 updates"):
        watch.check_skipped(5, 5)
