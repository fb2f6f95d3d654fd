"""The suite on local Ray: stopped, killed, continued, and the mistakes that end it before it starts."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "faults"))
from micro import ARGUMENTS, assert_same, steps_saved

from drama_jax.config import ConfigError
from drama_jax.training import run_directory
from experiments import suite, suite_plan, suite_ray, suite_worker
from experiments.suite_plan import Options
from experiments.suite_progress import Progress
from experiments.suite_task import Task

ROOT = pathlib.Path(__file__).parents[2]
LIMIT_S = 300.0
# Two games of as many actions, so that one is compiled for both. Long enough to be stopped in the middle.
GAMES, STEPS, EVERY = ("Pong", "Qbert"), 300, 25
MICRO = [*ARGUMENTS[2:], *f"--steps {STEPS} --logging.checkpoint-every {EVERY} --logging.images-every 1000".split()]
COMMAND = [*"--games Pong qbert --seeds 1 --cpus-per-task 2".split(), *MICRO]


def start(program: str, arguments: list[str], cache: pathlib.Path) -> subprocess.Popen[str]:
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{program}", *arguments],
        cwd=ROOT,
        env=os.environ | kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    return output


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)  # looking takes time from the process


def saved(logdir: pathlib.Path, game: str) -> bool:
    """Whether a run of the game has saved something."""
    return any((run / "checkpoints").is_dir() and steps_saved(run) for run in logdir.glob(f"{game}/*/seed*"))


def only(logdir: pathlib.Path, game: str) -> pathlib.Path:
    (run,) = logdir.glob(f"{game}/tiny/seed0-*")
    return run


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A suite that is stopped in its first game, and continued; the worker of its second game is killed.

    Returns its log directory, what the two commands printed, and an undisturbed run of the second game.
    """
    logdir, alone, cache = (tmp_path_factory.mktemp(name) for name in ("suite", "alone", "compiled"))
    arguments = [*COMMAND, "--logdir", str(logdir)]
    first = start("suite", arguments, cache)
    wait_for(first, lambda: saved(logdir, "Pong"))
    first.send_signal(signal.SIGTERM)
    stopped = end(first)
    reference = start("atari100k", [*MICRO, "--game", "Qbert", "--logdir", str(alone)], cache)
    again = start("suite", arguments, cache)
    wait_for(again, lambda: saved(logdir, "Qbert"))
    lock = re.fullmatch(r"process (\d+) on .+", (only(logdir, "Qbert") / "lock").read_text())
    os.kill(int(lock[1]), signal.SIGKILL)
    killed = end(again)
    end(reference)
    return logdir, stopped, killed, only(alone, "Qbert")


def test_stopped_it_names_the_command_that_continues(story):
    logdir, stopped, _, _ = story
    *_, before, command, nothing = stopped.split("\n")
    assert before == "stopped; to continue:" and nothing == ""
    assert shlex.split(command) == ["python", "-m", "experiments.suite", *COMMAND, "--logdir", str(logdir)]
    log = (logdir / "suite" / "Pong-tiny-seed0.log").read_text()
    step = int(re.search(r"going on from step (\d+)", log)[1])
    assert EVERY <= step < STEPS
    assert "SIGTERM: finishing the step and saving" in log and log.count("attempt 1") == 2


def test_a_killed_worker_loses_nothing(story):
    logdir, _, killed, alone = story
    log = (logdir / "suite" / "Qbert-tiny-seed0.log").read_text()
    assert "attempt 2" in log and "going on from step" in log
    assert_same(only(logdir, "Qbert"), alone)
    assert re.search(r"^Qbert +0 +300/300 +\S+  finished$", killed, re.MULTILINE)


def test_it_ends_with_the_table(story):
    logdir, _, killed, alone = story
    result = json.loads((logdir / "suite.json").read_text())
    score = json.loads((alone / "scores.json").read_text())["mean"]
    assert result["games"]["Qbert"]["scores"] == [score] and list(result["games"]) == list(GAMES)
    assert result["runs"]["Pong"][0]["run"] == str(only(logdir, "Pong"))
    assert (result["preset"], result["steps"]) == ("tiny", STEPS)
    normalised = [game["human_normalised"] for game in result["games"].values()]
    assert result["human_normalised"]["mean"]["value"] == pytest.approx(sum(normalised) / 2)
    assert result["published"]["DreamerV3"]["scores"]["Pong"] == -5.0
    assert "human-normalised interquartile mean" in killed
    assert "| human-normalised interquartile mean |" in (logdir / "suite.md").read_text()
    assert [path.suffix for path in (logdir / "suite").iterdir()] == [".log", ".log"]


def test_started_again_it_does_nothing_but_print_the_table(story, capsys, monkeypatch):
    logdir, _, killed, _ = story
    before = sorted(logdir.glob("*/*/*"))
    monkeypatch.setattr(suite_ray, "run", lambda *_: pytest.fail("there is nothing to run"))
    monkeypatch.setattr(suite.jax.config, "update", lambda *_: None)
    assert suite.main([*COMMAND, "--logdir", str(logdir)]) == 0
    assert capsys.readouterr().out.splitlines() == killed.splitlines()[-9:]
    assert sorted(logdir.glob("*/*/*")) == before


def test_more_seeds_leave_the_finished_ones_alone(story):
    logdir, *_ = story
    _, passed = suite_plan.split([*COMMAND, "--logdir", str(logdir)])
    options = Options(games=("Pong",), seeds=3)
    _, (task,) = suite_plan.plan(options, passed)
    assert not task.done
    (part,) = suite_worker.parts(task.options, task.game, task.planned)
    assert [one.config.seed for one in part] == [1, 2]
    _, tasks = suite_plan.plan(Options(games=("Pong",), seeds=3, seeds_per_task=1), passed)
    assert [task.done for task in tasks] == [True, False, False]


def test_other_settings_than_those_of_the_runs_are_refused(story, capsys):
    logdir, *_ = story
    assert suite.main([*COMMAND, "--logdir", str(logdir), "--agent.replay.tau", "3"]) == 2
    error = capsys.readouterr().err
    assert "--agent.replay.tau: the run in" in error and "or another --logdir" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--games Pogn", "--games: unknown game 'Pogn': did you mean Pong"),
        ("--games all Pong", "--games: unknown game 'all'"),
        ("--games Pong pong", "--games names Pong twice"),
        ("--game Pong", "--game: the suite takes several; name them with --games"),
        ("--game=Pong", "--game: the suite takes several"),
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--seeds five", "--seeds must be an integer, got 'five'"),
        ("--seeds 2000", "at most 1024 agents"),
        ("--seeds-per-task 0", "--seeds-per-task 0: must be at least 1"),
        ("--gpus-per-task 1.5", "--gpus-per-task 1.5: must be a share of one GPU, or a whole number"),
        ("--gpus-per-task -1", "--gpus-per-task -1.0: must be at least 0"),
        ("--ray-address 127.0.0.1:1", "--ray-address 127.0.0.1:1: cannot be reached"),
        ("--gpus-per-task nan", "--gpus-per-task nan: must be at least 0"),
        ("--cpus-per-task 0", "--cpus-per-task 0.0: must be more than 0"),
        ("--retries -1", "--retries -1: must be at least 0"),
        ("--no-resume", "--no-resume: the suite goes on with what is there"),
        ("--sweep.tau 10 20", "--sweep: the suite runs one setting"),
        ("--distributed.coordinator auto", "--distributed: the suite is one process that has many"),
        ("--steps ten", "--steps must be an integer, got 'ten'"),
        ("--agent.replay.tau -3", "agent.replay.tau"),
        ("--stpes 10", "--steps"),
        ("--preset huge", "--preset: unknown preset 'huge'"),
        ("--logdir pyproject.toml", "--logdir pyproject.toml: "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(suite_ray, "run", lambda *_: pytest.fail("it has started"))
    assert suite.main(["--logdir", str(tmp_path), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_refuses_is_one_line_that_says_how_to_give_a_token():
    class RayError(Exception):
        pass

    def init(*_, **__):
        raise RayError("token is\nmissing")

    ray = types.SimpleNamespace(init=init, exceptions=types.SimpleNamespace(RayError=RayError))
    with pytest.raises(ConfigError) as caught:
        suite_ray._connect(ray, Options(ray_address="host:1"))
    message = str(caught.value)
    assert message.startswith("--ray-address host:1: token is missing; if the cluster asks for a token, set RAY_AUTH_")
    assert "\n" not in message
    with pytest.raises(ConfigError, match="^Ray could not start: token is missing$"):
        suite_ray._connect(ray, Options())


def test_arguments_go_where_they_belong():
    own, passed = suite_plan.split(
        "--games Pong Qbert --steps 9 --seeds=2 --agent.replay.tau -3 --gpus_per_task .5".split()
    )
    assert own == ["--games", "Pong", "Qbert", "--seeds=2", "--gpus_per_task", ".5"]
    assert passed == ["--steps", "9", "--agent.replay.tau", "-3"]


def test_all_games_with_five_seeds_are_26_tasks(tmp_path):
    options, tasks = suite_plan.plan(Options(), ["--logdir", str(tmp_path)])
    assert len(tasks) == 26 and {tuple(task.seeds) for task in tasks} == {(0, 1, 2, 3, 4)}
    assert options.preset == "xs" and not any(task.done for task in tasks)
    _, tasks = suite_plan.plan(Options(games=("Pong",), seed=3, seeds_per_task=2), ["--logdir", str(tmp_path)])
    assert [tuple(task.seeds) for task in tasks] == [(3, 4), (5, 6), (7,)]


def test_a_share_of_a_gpu_has_that_share_of_its_memory():
    share = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert suite_ray.worker_environment(0.25, {}) == {share: "0.225"}
    assert suite_ray.worker_environment(2, {}) == {share: "0.900"}
    assert suite_ray.worker_environment(0, {}) == {"JAX_PLATFORMS": "cpu"}
    assert suite_ray.worker_environment(0.25, {share: "0.1"}) == {}


def begun(logdir: pathlib.Path, task: Task, seed: int, *steps: int) -> None:
    """What a run leaves that was cut off."""
    run = run_directory.create(logdir, task.game, "tiny", task.planned[seed].config)
    for step in steps:
        (run / "checkpoints" / str(step)).mkdir(parents=True)


@pytest.mark.parametrize(
    ("steps", "parts"),
    [
        ({}, [[0, 1, 2, 3]]),
        ({0: [], 1: [], 2: [], 3: []}, [[0, 1, 2, 3]]),
        ({0: [], 1: []}, [[0, 1], [2, 3]]),
        ({0: [10, 20], 1: [10, 20], 2: [10], 3: [10]}, [[0, 1, 2, 3]]),
        ({0: [10, 20], 1: [30, 40], 2: [30, 40]}, [[0], [1, 2], [3]]),
        ({0: [10], 1: [], 2: [10], 3: [10]}, [[0], [1], [2, 3]]),
    ],
)
def test_agents_that_cannot_go_on_together_go_one_after_the_other(tmp_path, steps, parts):
    _, (task,) = suite_plan.plan(Options(games=("Pong",), seeds=4), ["--logdir", str(tmp_path), "--preset", "tiny"])
    for seed, its in steps.items():
        begun(tmp_path, task, seed, *its)
    found = suite_worker.parts(task.options, task.game, task.planned)
    assert [[one.config.seed for one in part] for part in found] == parts


class Terminal:
    """A stream that says it is one."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_on_a_terminal_the_table_is_drawn_over_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "50")
    _, (task,) = suite_plan.plan(Options(games=("Pong",), seeds=2), ["--logdir", str(tmp_path), "--preset", "tiny"])
    terminal = Terminal()
    progress = Progress([task], terminal)
    progress.show()
    for seed in (0, 1):
        begun(tmp_path, task, seed)
        (run,) = tmp_path.glob(f"Pong/tiny/seed{seed}-*")
        line = {"step": 70 + seed, "charts/episodic_return": -20.0 + seed}
        (run / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 90')
    task.logs.mkdir()
    task.state_file.write_text('{"attempt": 2}')
    progress.close()
    first, second = terminal.text.split("\x1b[3A")
    assert "waiting" in first and "1 waiting" in first
    total = f"70/{task.options.steps:,}"
    assert re.search(rf"Pong +0-1 +{total} +-19.5  running, attempt 2\n1 running\n$", second)


def test_every_flag_in_the_readme_is_accepted():
    section = (ROOT / "README.md").read_text().split("## The whole suite")[1].split("\n## ")[0]
    own = {f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__}
    named = set(re.findall(r"--[a-z][\w.-]+", section))
    assert named >= {"--games", "--ray-address", "--seeds-per-task", "--gpus-per-task"}
    assert named - own <= {"--preset", "--steps", "--logdir"}
