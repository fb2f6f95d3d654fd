"""`experiments.jax_env`: its scan over all seeds is each seed's plain loop, it resumes, and it says what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.environments.bsuite.catch import Catch

from drama_jax import agent
from drama_jax.action_space import Continuous
from drama_jax.config import ConfigError
from drama_jax.envs import jax_env as environments
from drama_jax.replay import Transition
from drama_jax.training import checkpoint, config_file, in_graph, random_play
from experiments import jax_curves, jax_env, jax_options, jax_presets
from tests.tools import metrics_but_for_the_clock, metrics_lines

STEPS, WARMUP, SEEDS = 24, 14, (3, 4)


class Short(Catch):
    """Catch whose episodes are cut off after seven steps in place of nine."""

    @property
    def default_params(self):
        return super().default_params.replace(max_steps_in_episode=7)


NAME = f"{__name__}:Short"
ARGUMENTS = f"""
--env {NAME} --preset tiny --seed 3 --seeds 2 --steps {STEPS} --compilation-cache None --agent.warmup-steps {WARMUP}
--agent.acting-context 4 --agent.replay.capacity 20
--agent.world-model.autoencoder.depths 2 4 --agent.world-model.autoencoder.categoricals 4
--agent.world-model.autoencoder.classes 4 --agent.world-model.batch-size 2 --agent.world-model.batch-length 6
--agent.world-model.head-units 8 --agent.world-model.backbone.width 16 --agent.world-model.backbone.head-dim 8
--agent.world-model.backbone.chunk-size 8 --agent.imagination.batch-size 4 --agent.imagination.horizon 3
--agent.behaviour.actor-units 8 --agent.behaviour.critic-units 8
--logging.metrics-every 5 --logging.no-progress --random-episodes 3
""".split()


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """A program belongs to an environment object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environments, "load", functools.cache(environments.load))
        patch.setattr(environments, "JaxEnv", functools.cache(environments.JaxEnv))
        yield


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """Where the command has run to its end, with a picture and its data."""
    path = tmp_path_factory.mktemp("runs")
    files = ["--picture", str(path / "curves.png"), "--data", str(path / "curves.json")]
    assert jax_env.main([*ARGUMENTS, "--logdir", str(path), *files]) == 0
    return path


def run_of(logdir, seed):
    """A seed's run directory."""
    (directory,) = logdir.glob(f"Short/tiny/seed{seed}-*")
    return directory


def saved(directory):
    """The arrays of its last checkpoint."""
    snapshot, segments = checkpoint.load(directory, config_file.read(directory)["id"])
    assert snapshot.step == STEPS and segments == []
    return snapshot.device


@pytest.fixture(scope="module")
def by_hand():
    """seed -> (rewards, ends of episodes, metrics of updates, agent and acting at the end), by a loop on the host."""
    _, config, env = jax_options.parse(ARGUMENTS)
    init = jax.jit(lambda key: agent.init(key, config.agent, env.num_actions))
    reset, play, act = jax.jit(env.reset), jax.jit(env.step), jax.jit(agent.act)
    observe, update = jax.jit(agent.observe), jax.jit(agent.update)

    def loop(seed):
        key, agent_key, env_key = jax.random.split(jax.random.key(seed), 3)
        state, shown = init(agent_key), reset(env_key)
        acting = agent.initial_acting(state, 1)
        rewards, lasts, metrics = [], [], []
        for step in range(STEPS):
            key, action_key, env_key = jax.random.split(key, 3)
            if step < WARMUP:
                action = jax.random.randint(action_key, (), 0, env.num_actions)
            else:
                actions, acting = act(state, acting, shown.frame[None], action_key, shown.first[None])
                action = actions[0]
            after, outcome = play(shown, action, env_key)
            transition = Transition(shown.frame, action, outcome.reward, outcome.terminal, shown.first)
            shown = after
            if step < WARMUP:
                state = observe(state, transition)
            else:
                state, values = update(state, transition)
                metrics.append(values)
            rewards.append(float(outcome.reward))
            lasts.append(bool(outcome.last))
        return rewards, lasts, jax.tree.map(lambda *values: np.stack(values), *metrics), state, acting

    return {seed: loop(seed) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_scan_over_all_seeds_is_the_loop_of_each(seed, logdir, by_hand):
    directory = run_of(logdir, seed)
    rewards, lasts, metrics, state, acting = by_hand[seed]
    ends = np.flatnonzero(lasts)
    np.testing.assert_array_equal(ends, [6, 13, 20])  # truncated after seven steps
    episodes = [line for line in metrics_but_for_the_clock(directory) if "charts/episodic_return" in line]
    starts = [0, *(ends + 1)]
    assert episodes == [
        {"step": end + 1, "charts/episodic_return": sum(rewards[start : end + 1]), "charts/episodic_length": 7.0}
        for start, end in zip(starts, ends)
    ]
    means = {line["step"]: line for line in metrics_but_for_the_clock(directory) if "world_model/total_loss" in line}
    assert list(means) == [19, 24]
    for index, line in enumerate(means.values()):
        for name, values in metrics.items():
            mean = np.mean(values[5 * index : 5 * index + 5])
            np.testing.assert_allclose(line[name], mean, rtol=2e-4, atol=1e-6, err_msg=name)
    found = saved(directory)
    for name in ("frames", "actions", "rewards", "terminals", "firsts", "position", "size"):
        np.testing.assert_array_equal(found[f"agent/replay/{name}"], getattr(state.replay, name), err_msg=name)
    for name in ("trained", "imagined"):
        counter = getattr(state.replay.counters, name)
        np.testing.assert_array_equal(found[f"agent/replay/counters/{name}"], counter)
    np.testing.assert_array_equal(found["agent/key"], jax.random.key_data(state.key))
    assert found["episode_length"] == STEPS % 7 == found["acting/length"].item()  # of four that it may have
    for name, value in vars(acting).items():
        np.testing.assert_array_equal(found[f"acting/{name}"], value, err_msg=name)


def test_an_episode_that_is_cut_off_is_no_terminal_and_the_next_frame_starts_one(logdir):
    found = saved(run_of(logdir, 3))
    ring = (STEPS - 1 - np.arange(20)) % 20  # slot of the newest step, the one before it, ...
    assert not found["agent/replay/terminals"].any()
    np.testing.assert_array_equal(found["agent/replay/firsts"][ring], [(STEPS - 1 - age) % 7 == 0 for age in range(20)])


def test_the_environment_resets_itself():
    env = environments.make("Catch-bsuite", image_size=10)
    step = jax.jit(env.step)
    state = env.reset(jax.random.key(0))
    board = np.asarray(state.frame)[:, ::2, 0]  # columns are two pixels wide
    assert board[0].sum() == 255 and board[9].tolist() == [0, 0, 255, 0, 0]  # the ball above, the paddle below
    for count in range(9):
        state, outcome = step(state, jnp.int32(1), jax.random.key(count))
        assert bool(outcome.last) == bool(outcome.terminal) == bool(state.first) == (count == 8)
        assert float(outcome.reward) in ((1.0, -1.0) if count == 8 else (0.0,))
    board = np.asarray(state.frame)[:, ::2, 0]
    assert board[0].sum() == 255 and board[9].tolist() == [0, 0, 255, 0, 0]


def test_reward_and_end_are_stored_with_the_action_that_brought_them():
    """The last board of an episode is the one that is terminal, not the fresh one after it."""
    env = environments.make("Catch-bsuite", image_size=10)
    config = jax_presets.PRESETS["tiny"]().agent
    play = jax.jit(lambda key: in_graph.play_randomly(env, 20, in_graph.begin(config, env, key)))
    loop, history = play(jax.random.key(0))
    names = ("frames", "actions", "rewards", "terminals", "firsts")
    stored = Transition(*(np.asarray(getattr(loop.agent.replay, name)[:20]) for name in names))
    assert np.flatnonzero(stored.terminal).tolist() == np.flatnonzero(stored.reward).tolist() == [8, 17]
    assert np.flatnonzero(stored.first).tolist() == [0, 9, 18]
    rows = stored.frame[:, :9, ::2, 0].any(axis=2).argmax(axis=1)
    np.testing.assert_array_equal(rows, np.arange(20) % 9)  # the ball falls a row a step, and is above again
    ball = stored.frame[[8, 17], 8, ::2, 0].argmax(axis=1)  # its next row is the paddle's
    paddle = stored.frame[[8, 17], 9, ::2, 0].argmax(axis=1) + stored.action[[8, 17]] - 1
    np.testing.assert_array_equal(stored.reward[[8, 17]], np.where(np.clip(paddle, 0, 4) == ball, 1, -1))
    np.testing.assert_array_equal(history.rewards, stored.reward)


def test_seeds_differ(logdir):
    one, two = (metrics_but_for_the_clock(run_of(logdir, seed))[-1] for seed in SEEDS)
    assert one["world_model/total_loss"] != two["world_model/total_loss"]


def test_a_run_that_was_stopped_continues_with_the_same_bits(logdir, tmp_path, monkeypatch, capsys):
    asked = []

    @contextlib.contextmanager
    def after_the_second_chunk():
        yield lambda: asked.append(None) or len(asked) == 2

    with monkeypatch.context() as patch:
        patch.setattr(jax_env, "stop_requested", after_the_second_chunk)
        assert jax_env.main([*ARGUMENTS, "--logdir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("stopped; the same command continues\n")
    assert not list(tmp_path.rglob("scores.json"))
    assert jax_env.main([*ARGUMENTS, "--logdir", str(tmp_path)]) == 0
    assert "going on from step 19" in capsys.readouterr().out
    for seed in SEEDS:
        first, second = run_of(logdir, seed), run_of(tmp_path, seed)
        assert metrics_but_for_the_clock(first) == metrics_but_for_the_clock(second)
        seconds = [line["seconds"] for line in metrics_lines(second)]
        assert seconds == sorted(seconds) and seconds[-1] > 0  # to a millisecond: the first may be 0
        expected, found = saved(first), saved(second)
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_weights_are_found_where_other_commands_look(logdir):
    weights = checkpoint.load_weights(run_of(logdir, 3))
    assert weights["world_model"]["params"] and weights["behaviour"]["params"]


def test_the_table_has_every_seed_the_mean_and_its_standard_error(logdir):
    results = json.loads((logdir / "curves.json").read_text())
    assert results["seeds"] == [3, 4] and results["steps"] == STEPS and results["env"] == NAME
    assert (logdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["curves"]) == 2 and len(results["curves"][0]) == len(results["curve_steps"])
    assert results["final_ends_per_step"] == [0, 0] and len(results["final_metrics"]["actor_critic/entropy"]) == 2
    assert results["random_episodes"] == 3 and results["random_returns"] == [0, 0]  # the ball never lands
    results |= {"random_returns": [-1.0, -0.5], "final_returns": [0.5, None], "env": "Catch-bsuite"}
    assert jax_curves.table(results).splitlines() == [
        "| Catch-bsuite, 24 steps | random, 3 episodes | return, last 2 steps |",
        "| --- | ---: | ---: |",
        "| seed 3 | -1.00 | 0.50 |",
        "| seed 4 | -0.50 |  |",
        "| mean ± standard error | -0.75 ± 0.25 | 0.50 |",
    ]
    assert jax_curves.table(results | {"random_returns": []}).splitlines()[2] == "| seed 3 | 0.50 |"


class Lengths:
    """Episodes of 1 to 4 steps, as likely as each other; the reward is the action, 0 or 1."""

    num_actions, default_params = 2, None

    def observation_space(self, params):
        return spaces.Box(0, 1, (1,))

    def reset(self, key, params):
        return jnp.zeros(1, jnp.float32), jax.random.randint(key, (), 1, 5)

    def step(self, key, left, action, params):
        last = left == 1
        _, fresh = self.reset(key, params)
        return jnp.zeros(1), jnp.where(last, fresh, left - 1), action.astype(jnp.float32), last, False, {}


def test_random_play_is_of_whole_episodes_whatever_their_length(tmp_path, capsys):
    env = environments.JaxEnv(Lengths(), None, 1)
    returns, lengths = random_play.play(env, jax.random.key(0), episodes=2000)
    np.testing.assert_allclose(np.bincount(lengths)[1:], 500, atol=4 * np.sqrt(2000 * 3 / 16))  # deviations
    ones = [np.mean(np.asarray(returns)[np.asarray(lengths) == 4] == count) for count in range(5)]
    np.testing.assert_allclose(ones, np.array([1, 4, 6, 4, 1]) / 16, atol=4 * np.sqrt(1 / 4 / 500))
    _, lengths = random_play.play(env, jax.random.key(0), episodes=50, most_steps=2)
    assert set(lengths.tolist()) == {1, 2}

    model = {"agent": {"world_model": {"autoencoder": {"image_size": 1}}}}
    results = {"env": f"{__name__}:Lengths", "steps": 10, "seeds": [3, 4], "final_returns": [2, 3], "config": model}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(results))
    assert jax_curves.main(["--data", str(path), "--random-episodes", "50"]) == 0
    found = json.loads(path.read_text())
    assert found.pop("random_episodes") == 50 and results.items() <= found.items()
    one, two = found["random_returns"]
    assert one != two and 0.75 < one < 1.75 and 0.75 < two < 1.75  # 1.25 in the mean
    assert f"| seed 3 | {one:.2f} | 2.00 |" in capsys.readouterr().out
    path.write_text("[]")
    assert jax_curves.main(["--data", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --data {path} is no file of experiments.jax_env (")


def test_the_mean_curve_bridges_gaps_and_ends_where_a_seed_does():
    nan, steps = np.nan, np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    where, mean = jax_curves.mean_curve(steps, np.array([[nan, 0, nan, 4, 4], [6, 6, 6, 6, nan]]))
    assert where.tolist() == [2, 3, 4] and mean.tolist() == [3, 4, 5]
    assert [part.size for part in jax_curves.mean_curve(steps, np.array([[1.0] * 5, [nan] * 5]))] == [0, 0]


AE = "--agent.world-model.autoencoder"
WRONG = [
    ("", "--env is missing; name a JAX environment, for example --env Catch-bsuite"),
    ("--env Cach-bsuite", "--env: gymnax has no environment 'Cach-bsuite'; did you mean Catch-bsuite"),
    ("--env SimpleBandit-bsuite", "--env: observations must lie between two finite numbers, got 1.0 and 1.0"),
    (f"--env CartPole-v1 {AE}.vector-size 0", f"{AE}.vector-size must be 4 for CartPole-v1, got 0"),
    (f"--env Catch-bsuite {AE}.vector-size 3", f"{AE}.vector-size must be 0 for Catch-bsuite, got 3"),
    ("--env nowhere:Env", "--env: no environment 'nowhere:Env': No module named 'nowhere'"),
    ("--env math:Env", "--env: no environment 'math:Env': module 'math' has no attribute 'Env'"),
    ("--env Catch-bsuite --preset huge", "--preset: unknown preset 'huge'; accepted: tiny, minatar, vector, small, xs"),
    ("--env Catch-bsuite --seeds 0", "--seeds must be an integer from 1 to 1024, got 0"),
    ("--env Catch-bsuite --seed -1", "--seed must lie in [0, 2000000000], got -1"),
    ("--env Catch-bsuite --steps 0", "--steps must be an integer from 1 to 2147483647, got 0"),
    ("--env Catch-bsuite --steps many", "--steps must be an integer, got 'many'"),
    ("--env Catch-bsuite --random-episodes -1", "--random-episodes must be an integer from 0 to 10000, got -1"),
    ("--env Catch-bsuite --logging.metrics-every 0", "--logging.metrics-every must be an integer from 1"),
    (f"--env CartPole-v1 {AE}.reconstruction cross_entropy", f"{AE}.reconstruction must be squared_error for vector"),
    (f"--env Catch-bsuite {AE}.image-size 8", f"{AE}.image-size must be at least 10 for observations (10, 5), got 8"),
    (f"--env Catch-bsuite {AE}.image-size 11", f"{AE}.image-size must be a multiple of 2 for 2 depths, got 11"),
    (f"--env Catch-bsuite {AE}.image-channels 3", f"{AE}.image-channels must be 1 for Catch-bsuite, got 3"),
    ("--env Catch-bsuite --agent.replay.tau nan", "--agent.replay.tau must be a finite number, got nan"),
    ("--env Catch-bsuite --game Pong", "Unrecognized options: --game"),
    ("--env Catch-bsuite --picture nowhere/x.png", "nowhere/x.png cannot be written; name a file in a directory"),
    ("--env Catch-bsuite --logdir /dev/null/runs", "--logdir /dev/null/runs: /dev/null is a file; name a directory"),
]


@pytest.mark.parametrize(("text", "line"), WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(text, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert jax_env.main([*text.split(), "--compilation-cache", "None"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.splitlines(True) == [output.err]
    assert line in output.err
    assert list(tmp_path.iterdir()) == []


def test_without_gymnax_a_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    environments.load.cache_clear()
    assert jax_env.main(["--env", "Catch-bsuite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --env: JAX environments need gymnax: run python -m pip install -e '.[gymnax]'")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "preset", "shape"),
    [
        ("Breakout-MinAtar", "tiny", (10, 10, 4)),
        ("Asterix-MinAtar", "minatar", (10, 10, 4)),
        ("Seaquest-MinAtar", "small", (12, 12, 10)),
        ("Pong-misc", "xs", 64),
    ],
)
def test_images_are_as_small_as_the_environment_and_the_autoencoder_allow(name, preset, shape):
    _, config, env = jax_options.parse(["--env", name, "--preset", preset])
    expected = shape if isinstance(shape, tuple) else (shape, shape, 3)
    assert env.frame_shape == expected == config.agent.world_model.autoencoder.image_shape


def test_a_vector_environment_has_its_own_preset_unless_another_is_given():
    _, config, env = jax_options.parse(["--env", "Pendulum-v1"])
    options, other, _ = jax_options.parse(["--env", "CartPole-v1", "--preset=small"])
    assert env.num_actions == Continuous(1) and env.frame_shape == (3,)
    assert config.agent.world_model.autoencoder.vector_size == 3
    assert config == dataclasses.replace(jax_presets.PRESETS["vector"](), agent=config.agent)
    assert options.preset == "small" and other.agent.world_model.autoencoder.vector_size == 4
    _, boards, _ = jax_options.parse(["--env", "CartPole-v1", "--preset", "minatar"])
    assert boards.agent.world_model.autoencoder.reconstruction == "squared_error"  # numbers are no probabilities


def test_a_vector_environment_with_continuous_actions_from_end_to_end(tmp_path):
    small = [word for word in ARGUMENTS[2:] if word not in ("--preset", "tiny")]
    sizes = f"--steps 18 {AE}.vector-units 8 --logdir {tmp_path} --picture {tmp_path}/curves.png"
    assert jax_env.main(["--env", "Pendulum-v1", *small, *sizes.split()]) == 0
    for seed in SEEDS:
        (directory,) = tmp_path.glob(f"Pendulum-v1/vector/seed{seed}-*")
        found = checkpoint.load(directory, config_file.read(directory)["id"])[0].device
        stored = {name: found[f"agent/replay/{name}"][:18] for name in ("frames", "actions", "firsts")}
        assert stored["frames"].shape == (18, 3) and stored["frames"].dtype == np.float32
        np.testing.assert_allclose(np.square(stored["frames"][:, :2]).sum(axis=1), 1, rtol=1e-5)  # cosine and sine
        assert stored["actions"].shape == (18, 1) and np.abs(stored["actions"]).max() <= 1
        assert len(np.unique(stored["actions"])) == 18 and stored["firsts"].tolist() == [True] + 17 * [False]
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_needs_no_environment(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        jax_options.parse([flag])
    assert not stop.value.code
    output = capsys.readouterr().out
    assert "--seeds" in output and ("--agent.replay.tau" in output) == (flag == "--help-all")


def test_parts_of_a_run_check_their_arguments():
    env = environments.make("Catch-bsuite", image_size=12)
    with pytest.raises(TypeError, match="in_graph.train: loop must be of type Loop, got None"):
        in_graph.train(env, 3, None)
    with pytest.raises(TypeError, match="in_graph.play_randomly: env must be of type JaxEnv, got None"):
        in_graph.play_randomly(None, 3, None)
    config = jax_presets.PRESETS["tiny"]().agent
    with pytest.raises(ConfigError, match=r"frames of shape \(10, 10, 1\), but the environment shows \(12, 12, 1\)"):
        in_graph.check_frames(config, env)
