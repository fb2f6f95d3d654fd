"""Atari through both backends: the same game, the same bookkeeping, saved states, options, bad input."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from drama_jax.config import AtariConfig, ConfigError
from drama_jax.envs import Observation, envpool_backend, make_atari
from drama_jax.envs.base import StateMismatch

BACKENDS = ("envpool", "ale")


def _make(game="Breakout", *, num_envs=1, seed=0, image_size=64, **rules):
    return make_atari(game, AtariConfig(**rules), num_envs=num_envs, image_size=image_size, seed=seed)


def _actions(steps, num_envs, num_actions, seed=0):
    """[steps, E] random actions, each held with probability 1/2."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(num_actions, size=(steps, num_envs))
    for t in range(1, steps):
        actions[t] = np.where(rng.random(num_envs) < 0.5, actions[t - 1], actions[t])
    return actions.astype(np.int32)


def _play(env, actions):
    """One `Observation` of [T + 1, E, ...] arrays."""
    rows = [env.reset()]
    rows += [env.step(row) for row in actions]
    return Observation(*(np.stack(column) for column in zip(*rows)))


@pytest.mark.parametrize(
    ("game", "limit"), [("Breakout", 27_000), ("Frostbite", 27_000), ("MsPacman", 150), ("Seaquest", 150)]
)
def test_backends_play_the_same_game(game, limit):
    """One no-op at resets is what EnvPool can do. Only frames on which a game ended may differ (read by nobody)."""
    steps = 600
    envs = [_make(game, backend=backend, noop_max=1, max_episode_steps=limit) for backend in BACKENDS]
    assert envs[0].num_actions == envs[1].num_actions
    assert envs[0].frame_shape == envs[1].frame_shape == (64, 64, 3)
    actions = _actions(steps, 1, envs[0].num_actions)
    envpool, ale = (_play(env, actions) for env in envs)

    for name in Observation._fields:
        ours, theirs = getattr(ale, name), getattr(envpool, name)
        assert ours.dtype == theirs.dtype
        if name != "frames":
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    over = ale.last & ~ale.truncated
    np.testing.assert_array_equal(ale.frames[~over], envpool.frames[~over])
    # The run held what it is meant to compare.
    assert over.any() == (limit > steps)
    assert ale.truncated.any() == (limit < steps)
    assert (ale.terminals & ~over).any(), "no life was lost"
    assert ale.rewards.any()
    assert len(np.unique(ale.frames.reshape(steps + 1, -1), axis=0)) > steps // 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_bookkeeping_of_episodes(backend):
    limit = 60
    env = _make("Breakout", backend=backend, num_envs=3, max_episode_steps=limit)
    run = _play(env, _actions(300, 3, env.num_actions, seed=1))
    assert run.frames.dtype == np.uint8
    assert run.frames.shape == (301, 3, 64, 64, 3)

    assert run.first[0].all()
    np.testing.assert_array_equal(run.first[1:], run.last[:-1])  # the row after an episode's last is a reset row
    for flags in (run.rewards, run.terminals, run.last, run.truncated):
        assert not flags[run.first].any()
    assert not (run.truncated & ~run.last).any()
    over = run.last & ~run.truncated
    assert (run.terminals | ~over).all()
    before, after = run.lives[:-1], run.lives[1:]
    lost = (after < before) & ~run.first[1:]
    np.testing.assert_array_equal(run.terminals[1:], lost | over[1:])
    assert lost.any()
    for i in range(3):
        starts, ends = np.flatnonzero(run.first[:, i]), np.flatnonzero(run.last[:, i])
        lengths = ends - starts[: len(ends)]
        cut = run.truncated[ends, i]
        assert (lengths[cut] == limit).all()
        assert (lengths[~cut] <= limit).all()
    assert run.truncated.any()


def test_game_over_ends_an_episode_as_terminal_and_not_truncated():
    env = _make("Breakout", backend="ale")
    run = _play(env, _actions(700, 1, env.num_actions, seed=2))
    ends = np.flatnonzero(run.last[:, 0])
    assert len(ends) >= 1
    assert not run.truncated.any()
    assert run.terminals[ends].all()
    assert (run.lives[ends] == 0).all()
    assert (run.lives[ends + 1] == 5).all()  # the reset row


@pytest.mark.parametrize("backend", BACKENDS)
def test_life_loss_is_no_terminal_if_so_configured(backend):
    env = _make("Breakout", backend=backend, life_loss_is_terminal=False)
    run = _play(env, _actions(250, 1, env.num_actions))
    assert (np.diff(run.lives[:, 0]) < 0).any()
    np.testing.assert_array_equal(run.terminals, run.last & ~run.truncated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sticky_actions(backend):
    """With probability 1 the first action (the reset's NOOP) is repeated for ever: actions have no effect."""
    for sticky, same in ((1.0, True), (0.0, False)):
        left, right = (_make("Pong", backend=backend, sticky_actions=sticky) for _ in range(2))
        runs = [_play(env, np.full((40, 1), action, np.int32)) for env, action in ((left, 2), (right, 3))]
        assert np.array_equal(runs[0].frames, runs[1].frames) == same


def test_noops_at_resets_of_ale():
    def played(noop_max, resets):
        env = _make("Freeway", backend="ale", noop_max=noop_max, image_size=16)
        return {env.reset() and env._emulators[0]._ale.getEpisodeFrameNumber() for _ in range(resets)}

    assert played(0, 3) == {0}
    assert played(1, 3) == {1}
    assert played(5, 60) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_noops_depend_on_the_seed_and_vary(backend):
    def resets(seed):
        env = _make("Freeway", backend=backend, num_envs=2, seed=seed, noop_max=200)
        return np.stack([env.reset().frames for _ in range(3)])

    first = resets(0)
    np.testing.assert_array_equal(first, resets(0))
    assert (first != resets(50)).any()
    assert (first[0] != first[1]).any()
    assert (first[:, 0] != first[:, 1]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_action_space_and_image_size(backend):
    env = _make("Breakout", backend=backend, full_action_space=True, image_size=32)
    assert env.num_actions == 18
    assert env.frame_shape == (32, 32, 3)
    assert env.reset().frames.shape == (1, 32, 32, 3)
    assert env.step(np.array([17])).frames.shape == (1, 32, 32, 3)
    assert _make("Breakout", backend=backend).num_actions == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_of_four_frames_is_four_steps_of_one(backend):
    slow, fast = (_make("Breakout", backend=backend, frame_skip=skip) for skip in (1, 4))
    actions = _actions(100, 1, fast.num_actions, seed=1)
    single, skipped = _play(slow, np.repeat(actions, 4, axis=0)), _play(fast, actions)
    assert skipped.rewards.any()
    np.testing.assert_array_equal(single.rewards[1:].reshape(100, 4).sum(1), skipped.rewards[1:, 0])
    np.testing.assert_array_equal(single.lives[::4], skipped.lives)
    # Maximum over the last two frames: no darker than the last one alone (up to the rounding of the resize).
    assert (skipped.frames[1:].astype(int) >= single.frames[4::4]).all()
    assert (skipped.frames[1:] != single.frames[4::4]).any()


_RESTORE = """
import hashlib, pathlib, sys
import numpy as np
from drama_jax.config import AtariConfig
from drama_jax.envs import make_atari
folder = pathlib.Path(sys.argv[1])
config = AtariConfig(backend="ale", noop_max=4, sticky_actions=0.25, max_episode_steps=150)
env = make_atari(sys.argv[2], config, num_envs=2, image_size=64, seed=99)
digest = hashlib.sha256(b"".join(array.tobytes() for array in env.set_state((folder / "state").read_bytes())))
for row in np.load(folder / "actions.npy"):
    digest.update(b"".join(array.tobytes() for array in env.step(row)))
print(digest.hexdigest())
"""


# Frostbite: a reset carries over what was played before. Qbert: the emulator's own state is not all of it.
@pytest.mark.parametrize("game", ["Frostbite", "Qbert"])
def test_state_is_restored_in_another_process(tmp_path, game):
    """Observations, no-ops and sticky actions go on as if nothing had happened, through ends of episodes."""
    env = _make(game, backend="ale", num_envs=2, noop_max=4, sticky_actions=0.25, max_episode_steps=150)
    actions = _actions(520, 2, env.num_actions)
    saved_at = 170  # in the middle of an episode
    played = _play(env, actions[:saved_at])
    (tmp_path / "state").write_bytes(env.get_state())
    np.save(tmp_path / "actions.npy", actions[saved_at:])
    digest = hashlib.sha256(b"".join(array[-1].tobytes() for array in played))
    ends = 0
    for row in actions[saved_at:]:
        observation = env.step(row)
        ends += int(observation.last.sum())
        digest.update(b"".join(array.tobytes() for array in observation))
    assert ends >= 4
    done = subprocess.run(
        [sys.executable, "-c", _RESTORE, str(tmp_path), game], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest.hexdigest()


def test_state_of_an_ended_episode_and_of_other_settings():
    env = _make("Breakout", backend="ale", max_episode_steps=3)
    run = _play(env, np.ones((3, 1), np.int32))
    assert run.last[-1].all()
    state = env.get_state()
    other = _make("Breakout", backend="ale", max_episode_steps=3, seed=5)
    assert other.set_state(state).last.all()
    assert other.step(np.array([1])).first.all()
    for rules in ({"max_episode_steps": 4}, {"max_episode_steps": 3, "num_envs": 2}):
        with pytest.raises(ConfigError, match="use the saved settings"):
            _make("Breakout", backend="ale", **rules).set_state(state)


# Frostbite: a reset carries over what was played before, so the running episode's actions alone would not do.
@pytest.mark.parametrize("rules", [{}, {"noop_max": 4, "sticky_actions": 0.25}])
def test_envpool_returns_to_a_state_by_playing_everything_again(rules):
    env = _make("Frostbite", num_envs=2, max_episode_steps=60, **rules)
    actions = _actions(300, 2, env.num_actions)
    saved = [_play(env, actions[:170]), env.get_state()][1]
    following = [env.step(row) for row in actions[170:]]
    other = _make("Frostbite", num_envs=2, max_episode_steps=60, **rules)
    other.reset()  # it need not be fresh
    seen: list[tuple[int, int]] = []
    observation = other.set_state(saved, on_step=lambda *progress: seen.append(progress))
    assert seen == [(call, 171) for call in range(1, 172)]  # the reset, and every step
    again = [other.step(row) for row in actions[170:]]
    for one, two in zip(following, again):
        for left, right in zip(one, two):
            np.testing.assert_array_equal(left, right)
    assert any(row.first.any() for row in following) and not observation.first.any()
    # From there it can be saved again.
    third = _make("Frostbite", num_envs=2, max_episode_steps=60, **rules)
    np.testing.assert_array_equal(third.set_state(other.get_state()).frames, again[-1].frames)


def test_envpool_says_when_it_did_not_get_there(monkeypatch):
    env = _make("Breakout", max_episode_steps=60)
    with pytest.raises(RuntimeError, match="call reset"):
        env.get_state()
    _play(env, _actions(20, 1, 4))
    state = env.get_state()
    with pytest.raises(ConfigError, match="use the saved settings"):
        _make("Breakout", max_episode_steps=61).set_state(state)
    with monkeypatch.context() as patch:
        patch.setattr(envpool_backend, "_digest", lambda observation: "another")
        with pytest.raises(StateMismatch, match="do not lead to the same picture"):
            env.set_state(state)
    monkeypatch.setattr(envpool_backend, "_version", lambda: "9.9")
    with pytest.raises(StateMismatch, match="saved by envpool .*, this is 9.9"):
        env.set_state(state)
    # It is as new, and what it plays now can be saved.
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.array([0]))
    assert env.reset().first.all()
    np.testing.assert_array_equal(env.set_state(env.get_state()).frames, env.reset().frames)


def test_ale_says_when_another_version_saved_the_state(monkeypatch):
    env = _make("Breakout", backend="ale")
    env.reset()
    state = env.get_state()
    monkeypatch.setattr("ale_py.__version__", "9.9")
    with pytest.raises(StateMismatch, match="saved by ale-py .*, this is 9.9"):
        env.set_state(state)


@pytest.fixture(scope="module")
def pairs():
    """Two copies of Breakout in each backend."""
    envs = {backend: _make("Breakout", backend=backend, num_envs=2) for backend in BACKENDS}
    yield envs
    for env in envs.values():
        env.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "actions",
    [
        np.array([4, 0]),
        np.array([-1, 0]),
        np.array([99, 0]),
        np.array([1]),
        np.array([1, 1, 1]),
        np.array([[1, 1]]),
        np.array([1.0, 1.0]),
        np.array([True, False]),
        3,
    ],
)
def test_bad_actions_are_refused_before_the_emulator(pairs, backend, actions):
    env = pairs[backend]
    env.reset()
    with pytest.raises(ValueError, match="actions must") as error:
        env.step(actions)
    assert "\n" not in str(error.value)
    assert not env.step(np.array([0, 0])).first.any()  # still in working order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs must be an integer from 1"),
        ({"num_envs": 1.5}, "num_envs must be"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**31}, "seed must be"),
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": "x"}, "image_size must be"),
        ({"num_threads": -2}, "num_threads must be"),
        ({"game": "Brakout"}, "unknown game 'Brakout': did you mean Breakout"),
        ({"game": "ALE/Pnog-v5"}, "unknown game"),
        ({"max_episode_steps": 2**31}, "max_episode_steps must be"),
        ({"noop_max": 2**40}, "noop_max must be"),
        ({"noop_max": -1}, "noop_max must be"),
        ({"frame_skip": 0}, "frame_skip must be"),
        ({"sticky_actions": 1.5}, "sticky_actions must"),
        ({"max_episode_steps": 0}, "max_episode_steps must be"),
    ],
)
def test_bad_arguments_give_one_line(backend, arguments, message):
    rules = {field.name: arguments[field.name] for field in dataclasses.fields(AtariConfig) if field.name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in rules}
    call = {"game": "Breakout", "num_envs": 1, "image_size": 64, "seed": 0, **rest}
    with pytest.raises(ConfigError) as error:
        make_atari(config=AtariConfig(backend=backend, **rules), **call)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_backend():
    with pytest.raises(ConfigError, match="AtariConfig.backend must be one of 'envpool', 'ale', got 'gym'"):
        AtariConfig(backend="gym")


@pytest.mark.parametrize(
    ("backend", "module", "remedies"),
    [
        ("envpool", "envpool", ["python -m pip install -e '.[experiments]'", "--env-backend ale"]),
        ("ale", "ale_py", ["python -m pip install -e '.[ale]'"]),
    ],
)
def test_missing_backend_names_the_remedy(monkeypatch, backend, module, remedies):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        _make("Breakout", backend=backend)
    for remedy in remedies:
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_needs_a_reset_and_an_open_environment(backend):
    env = _make("Breakout", backend=backend)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.array([0]))
    env.reset()
    env.close()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.array([0]))


def test_importing_the_package_imports_no_emulator():
    code = "import sys, drama_jax.envs; print([m for m in ('envpool', 'ale_py', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
