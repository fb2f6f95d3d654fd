"""Random input: the command line, a run's files, and everything that a checkpoint consists of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drama_jax.config import AtariConfig, ConfigError, RunConfig, preset
from drama_jax.envs import make_atari
from drama_jax.envs.base import StateMismatch, pack_state, unpack_state
from drama_jax.replay import init
from drama_jax.training import checkpoint, config_file, files, manifest, metrics_file, replay_log, resume
from drama_jax.training.checkpoint import Snapshot
from drama_jax.training.checkpoint_writer import Checkpoints
from drama_jax.training.replay_log import Row, Segment
from experiments import atari_options

QUIET = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one_line(message: str) -> bool:
    return message.splitlines() == [message]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def fields(config, prefix):
    """The dotted flags of a configuration."""
    for field in dataclasses.fields(config):
        name, value = (
            f"{prefix}.{field.name}".replace("_", "-").replace("lambda-", "lambda_"),
            getattr(config, field.name),
        )
        yield from fields(value, name) if dataclasses.is_dataclass(value) else [f"--{name}"]


PLAIN = ["--game", "--preset", "--steps", "--seed", "--logdir", "--env-backend", "--eval-episodes", "--sampler"]
PLAIN += ["--compilation-cache", "--resume", "--no-resume", "--deterministic", "--help", "--help-all", "-h", "--", "-"]
NAMES = [
    name for part in ("agent", "atari", "evaluation", "logging") for name in fields(getattr(RunConfig(), part), part)
]
VALUES = st.one_of(
    st.integers(-10, 300).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "True", "None", "xs", "tiny", "dfs", "mamba2", "1e5", "0x1", "1_0", "auto", "[bold]", "{}"]),
    st.text(max_size=12),
)
FLAGS = st.one_of(st.sampled_from(NAMES), st.sampled_from(PLAIN), st.text(max_size=8).map(lambda name: f"--{name}"))
TOKENS = st.one_of(
    st.tuples(FLAGS, VALUES).map(list),
    st.tuples(FLAGS, VALUES).map(lambda pair: ["=".join(pair)]),
    st.tuples(FLAGS, VALUES, VALUES).map(list),
    FLAGS.map(lambda name: [name]),
    VALUES.map(lambda value: [value]),
)


@QUIET
@given(st.booleans(), st.lists(TOKENS, max_size=3))
def test_any_command_line_is_a_run_or_one_line(capsys, game, parts):
    arguments = [*(["--game", "Pong"] if game else []), *(token for part in parts for token in part)]
    try:
        _, config = atari_options.parse(arguments, "program")
    except ConfigError as error:
        assert one_line(str(error)) and capsys.readouterr() == ("", "")
    except SystemExit as stop:
        assert stop.code == 0 and "usage" in capsys.readouterr().out
    else:
        assert isinstance(config, RunConfig) and hash(config)
        assert config_file._from_dict(RunConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@QUIET
@given(st.sampled_from(NAMES), VALUES)
@example("--logging.tensorboard", "tiny")
@example("--logging.tensorboard", "\x1b")
@example("--logging.tensorboard", "\u2028│ ")
def test_any_override_of_one_field_is_taken_or_the_flag_named(name, value):
    try:
        atari_options.parse(["--game", "Pong", "--preset", "tiny", f"{name}={value}"], "program")
    except ConfigError as error:
        group, _, field = name.rpartition(".")
        assert one_line(str(error)) and (field in str(error) or group in str(error))


# ---------------------------------------------------------------------------------------------------------------------
# config.json, scores.json and metrics.jsonl

GOOD = {"id": "a run", "game": "Pong", "preset": "tiny", "config": dataclasses.asdict(preset("tiny"))}
TEXTS = [
    b"", b"{", b"null", b"[]", b"5", b'"text"', b"{}", b"\xff\xfe", b"\x00" * 50, b"[" * 100_000, b"\x80\x04K\x01.",
    b'{"config": 3}', b'{"game": "Pong", "preset": "tiny", "id": 5, "config": {}}', json.dumps(GOOD).encode()[:-30],
    json.dumps(GOOD | {"game": 5}).encode(), json.dumps(GOOD | {"preset": None}).encode(),
    json.dumps(GOOD | {"continued": 5}).encode(), json.dumps(GOOD | {"config": [1]}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", TEXTS, ids=range(len(TEXTS)))
def test_garbage_for_a_config_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for read in (
        config_file.read,
        lambda run: resume.check(run, "Pong", "tiny", preset("tiny")),
        lambda run: resume.note(run, preset("tiny"), 3, {}),
    ):
        with pytest.raises(ConfigError) as error:
            read(tmp_path)
        assert str(tmp_path / "config.json") in str(error.value) and one_line(str(error.value))
    assert (tmp_path / "config.json").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


CHANGES = [
    (("agent", "replay", "tau"), "ten", "ReplayConfig.tau must be a finite number, got 'ten'"),
    (("agent", "replay", "tau"), None, "ReplayConfig.tau must be a finite number, got None"),
    (("agent", "replay", "tau"), float("nan"), "ReplayConfig.tau must be a finite number, got nan"),
    (("agent", "replay"), 5, "ReplayConfig is '5'"),
    (("agent", "replay", "tao"), 5.0, "ReplayConfig: tao"),
    (("agent", "world_model", "autoencoder", "depths"), "4", "AutoencoderConfig.depths must be a tuple of integers"),
    (("steps",), True, "RunConfig.steps must be an integer"),
    (("atari", "full_action_space"), 1, "AtariConfig.full_action_space must be True or False, got 1"),
    (("logging",), {}, "LoggingConfig: checkpoint_every, images_every"),
]


@pytest.mark.parametrize(("path", "value", "line"), CHANGES, ids=[line for *_, line in CHANGES])
def test_a_saved_configuration_of_wrong_fields_names_them(tmp_path, path, value, line):
    content = json.loads(json.dumps(GOOD))
    *groups, name = path
    node = content["config"]
    for group in groups:
        node = node[group]
    node[name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        config_file.load_config(tmp_path)
    assert line in str(error.value) and "config.json" in str(error.value) and one_line(str(error.value))


@pytest.mark.parametrize("content", TEXTS, ids=range(len(TEXTS)))
def test_garbage_for_scores_and_metrics_is_moved_aside_or_ignored(tmp_path, content):
    (tmp_path / "scores.json").write_bytes(content)
    assert not resume.finished(tmp_path, 0)
    good = b'{"step": 1, "loss": 0.5}\n'
    lines = [b"[1]\n", b"5\n", b'"step"\n', b'{"step": "x"}\n', b'{"step": null}\n', b"{}\n", content + b"\n"]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([good, *lines, b'{"step": 3}\n', b'{"step": 1']))
    metrics_file.cut(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
    cut = (tmp_path / "metrics-cut.jsonl").read_bytes()
    assert cut == b"".join([*lines, b'{"step": 3}\n', b'{"step": 1'])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def snapshot(step: int) -> Snapshot:
    rng = np.random.default_rng(step)
    device = {
        "agent/world_model/params/dense/kernel": rng.normal(size=(5, 7)).astype(np.float32),
        "agent/world_model/params/dense/bias": np.asarray(jnp.arange(7, dtype=jnp.bfloat16)),
        "agent/behaviour/params/actor/kernel": rng.normal(size=(3,)).astype(np.float32),
        "agent/key": rng.integers(0, 2**32, 2, dtype=np.uint32),
        "metrics/a|b": np.float32(step),
    }
    return Snapshot(step, step - 1, device, {"number": step / 3}, {"environment": rng.integers(0, 256, 99, np.uint8)})


def rows(start: int, stop: int) -> list[Row]:
    return [
        Row(
            np.full((1, 2, 2, 3), n, np.uint8),
            *(np.array([n]).astype(kind) for kind in (np.int32, np.float32, bool, bool)),
        )
        for n in range(start, stop)
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with the checkpoints 20 and 30."""
    run = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(run, "a run", capacity=25)
    for start, step in ((0, 20), (19, 30)):
        for row in rows(start, step - 1):
            checkpoints.add(row)
        checkpoints.save(snapshot(step))
    checkpoints.close()
    assert checkpoints.error is None
    return run


@pytest.fixture(scope="module")
def whole(saved):
    return {
        step: contents(checkpoint._read(saved / "checkpoints" / str(step), _manifest(saved, step))) for step in (20, 30)
    }


def _manifest(run, step):
    return manifest.verify(run / "checkpoints" / str(step))


def contents(found: Snapshot) -> dict[str, object]:
    arrays = {
        name: (array.dtype.str, array.shape, array.tobytes()) for name, array in (found.device | found.host).items()
    }
    return {**arrays, "step": found.step, "end": found.end, "header": found.header}


@contextlib.contextmanager
def copied(saved, tmp_path_factory):
    """A copy of the run, to be damaged."""
    run = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(saved, run)
    yield run
    shutil.rmtree(run.parent)


def damage(path: pathlib.Path, how: str, where: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    place = min(int(where * len(content)), max(len(content) - 1, 0))
    if how == "truncate":
        del content[place:]
    elif how == "flip" and content:
        content[place] ^= 1 << bit
    elif how == "insert":
        content[place:place] = bytes([bit])
    elif how == "repeat":
        content = content * 2
    elif how == "remove":
        path.unlink()
        return
    path.write_bytes(content)


@settings(QUIET, max_examples=100)
@given(
    which=st.integers(0, 10**6),
    how=st.sampled_from(["truncate", "flip", "flip", "insert", "repeat", "remove"]),
    where=st.floats(0, 1),
    bit=st.integers(0, 7),
    segment=st.booleans(),
)
def test_a_damaged_checkpoint_is_never_another_one(saved, whole, tmp_path_factory, which, how, where, bit, segment):
    """Whatever happens to one file: the saved values to the bit, of this checkpoint or the one before, or one line."""
    with copied(saved, tmp_path_factory) as run:
        there = sorted(path for path in (run / ("replay" if segment else "checkpoints")).rglob("*") if path.is_file())
        path = there[which % len(there)]
        before = path.read_bytes()
        damage(path, how, where, bit)
        harmless = path.exists() and path.read_bytes() == before
        messages: list[str] = []
        try:
            found, segments = checkpoint.load(run, "a run", messages.append)
        except ConfigError as error:
            assert segment and not harmless and path.name in str(error) and one_line(str(error))
            return
        assert contents(found) == whole[found.step]
        if found.step == 20:
            assert not harmless and len(messages) == 1 and one_line(messages[0]) and path.name in messages[0]
        like = init(preset("tiny").agent.replay.__class__(capacity=25), (2, 2, 3))
        ring = replay_log.with_rows(run, segments, found.end, replay_log.without_rows(like), like)
        end = found.end
        np.testing.assert_array_equal(
            ring.actions[np.arange(max(0, end - 25), end) % 25], np.arange(max(0, end - 25), end)
        )


@settings(QUIET, max_examples=60)
@given(
    which=st.integers(0, 10**6),
    how=st.sampled_from(["truncate", "flip", "insert", "repeat", "remove"]),
    where=st.floats(0, 1),
    bit=st.integers(0, 7),
)
def test_damaged_weights_are_refused(saved, which, how, where, bit):
    """Of a single checkpoint; the file is put back afterwards."""
    directory = saved / "checkpoints" / "30"
    there = sorted(path for path in directory.rglob("*") if path.is_file())
    path = there[which % len(there)]
    before = path.read_bytes()
    try:
        damage(path, how, where, bit)
        harmless = path.exists() and path.read_bytes() == before
        weights = checkpoint.load_weights(directory)
    except ConfigError as error:
        assert not harmless and path.name in str(error) and one_line(str(error))
    else:
        assert harmless
        kernel = snapshot(30).device["agent/world_model/params/dense/kernel"]
        np.testing.assert_array_equal(weights["world_model"]["params"]["dense"]["kernel"], kernel)
    finally:
        path.write_bytes(before)


NAMES_OF_FILES = st.one_of(
    st.sampled_from(
        ["99", "030", "٣", "a.pkl", "x.partial", "30.damaged", "9-19.npz", "19-29", "manifest.json.bak", "-1"]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
)


@settings(QUIET, max_examples=25)
@given(
    folder=st.sampled_from(["", "checkpoints", "checkpoints/30", "checkpoints/30/agent", "replay"]),
    name=NAMES_OF_FILES,
    content=st.one_of(st.binary(max_size=40), st.none()),
)
@example(folder="checkpoints", name="٣", content=None)
@example(folder="checkpoints", name="030", content=None)
@example(folder="checkpoints", name="99", content=b"")
@example(folder="checkpoints/30", name="a\nb", content=b"")
def test_extra_files_are_ignored_or_named(saved, whole, tmp_path_factory, folder, name, content):
    with copied(saved, tmp_path_factory) as run:
        path = run / folder / name
        if path.exists():
            return
        path.mkdir() if content is None else path.write_bytes(content)
        messages: list[str] = []
        found, segments = checkpoint.load(run, "a run", messages.append)
        assert contents(found) == whole[found.step] and all(map(one_line, messages))
        if found.step == 20:  # in the checkpoint itself: named
            assert folder.startswith("checkpoints/30") and "does not belong to it" in messages[0]
        # The next save is not in its way either.
        said: list[str] = []
        checkpoints = Checkpoints(run, "a run", 25, segments, said.append)
        for row in rows(found.end, 39):
            checkpoints.add(row)
        checkpoints.save(snapshot(40))
        checkpoints.close()
        assert checkpoints.error is None and said == []
        assert contents(checkpoint.load(run, "a run", said.append)[0])["step"] == 40 or said


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is executed


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def disguise(run: pathlib.Path, path: pathlib.Path, step: int) -> None:
    """Gives the manifest the digest of a file that somebody has put there."""
    directory = run / "checkpoints" / str(step)
    content = json.loads((directory / "manifest.json").read_text())
    table, root = ("files", directory) if path.is_relative_to(directory) else ("segments", run)
    content[table][str(path.relative_to(root))] = files.describe(path)
    del content["sha256"]
    (directory / "manifest.json").write_text(json.dumps(content | {"sha256": manifest._digest(content)}))


def pickles(bomb: Bomb) -> dict[str, bytes]:
    """Pickled code, bare, and where numpy would look for it."""
    path = pathlib.Path(bomb.path).with_suffix(".npz")
    np.savez(path, header=np.array([bomb], object), frames=np.array([bomb], object))
    archive = path.read_bytes()
    np.save(path.with_suffix(".npy"), np.array([bomb], object))
    return {"bare": pickle.dumps(bomb), "npz": archive, "npy": path.with_suffix(".npy").read_bytes()}


@pytest.mark.parametrize("kind", ["bare", "npz", "npy"])
@pytest.mark.parametrize(
    "where", ["loop.npz", "manifest.json", "agent/_METADATA", "agent/more.pkl", "replay", "agent/d"]
)
def test_code_in_a_checkpoint_is_never_executed(saved, whole, tmp_path, tmp_path_factory, where, kind):
    """Even where whoever planted it has forged the manifest as well."""
    bomb = Bomb(tmp_path / "executed")
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it works"))).close()
    assert (tmp_path / "it works").exists()
    with copied(saved, tmp_path_factory) as run:
        directory = run / "checkpoints" / "30"
        path = directory / where
        if where == "replay":
            path = run / "replay" / "19-29.npz"
        elif where == "agent/d":  # the data themselves
            path = max(
                (file for file in (directory / "agent").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
            )
        path.write_bytes(pickles(bomb)[kind])
        if where != "manifest.json":
            disguise(run, path, 30)
        with contextlib.suppress(ConfigError):
            checkpoint.load_weights(directory)
        messages: list[str] = []
        with contextlib.suppress(ConfigError):
            found, segments = checkpoint.load(run, "a run", messages.append)
            assert contents(found) == whole[found.step] and all(map(one_line, messages))
            like = init(preset("tiny").agent.replay.__class__(capacity=25), (2, 2, 3))
            replay_log.with_rows(run, segments, found.end, replay_log.without_rows(like), like)
        assert not (tmp_path / "executed").exists()


def test_a_forged_replay_segment_is_one_line_that_names_it(saved, tmp_path, tmp_path_factory):
    like = init(preset("tiny").agent.replay.__class__(capacity=25), (2, 2, 3))
    with copied(saved, tmp_path_factory) as run:
        columns = files.unpack(run / "replay" / "19-29.npz")
        for content, line in (
            (pickles(Bomb(tmp_path / "x"))["npz"], "allow_pickle"),
            (
                files.pack({**columns, "actions": columns["actions"][:-1]}),
                r"actions must be int32 \[10\], got int32 \[9\]",
            ),
            (
                files.pack({**columns, "rewards": columns["actions"]}),
                r"rewards must be float32 \[10\], got int32 \[10\]",
            ),
            (files.pack({"frames": columns["frames"]}), "KeyError: 'actions'"),
        ):
            (run / "replay" / "19-29.npz").write_bytes(content)
            with pytest.raises(ConfigError, match=line) as error:
                replay_log.with_rows(run, [Segment(0, 19), Segment(19, 29)], 29, replay_log.without_rows(like), like)
            assert "replay/19-29.npz cannot be used" in str(error.value) and one_line(str(error.value))


# ---------------------------------------------------------------------------------------------------------------------
# Saved emulators


@pytest.fixture(scope="module", params=["ale", "envpool"])
def emulator(request):
    environment = make_atari("Pong", AtariConfig(backend=request.param), num_envs=1, image_size=16, seed=0)
    environment.reset()
    yield environment, environment.get_state()
    environment.close()


@settings(QUIET, max_examples=40)
@given(how=st.sampled_from(["truncate", "flip", "insert", "repeat"]), where=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_damaged_emulator_state_never_reaches_the_emulator(emulator, tmp_path_factory, how, where, bit):
    """ale-py corrupts the memory of the process if it is given some of these."""
    environment, state = emulator
    path = tmp_path_factory.getbasetemp() / "state"
    path.write_bytes(state)
    damage(path, how, where, bit)
    given = path.read_bytes()
    if given == state:
        return
    with pytest.raises(StateMismatch, match="bytes are damaged") as error:
        environment.set_state(given)
    assert one_line(str(error.value))


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 32, b"PK\x03\x04", pickle.dumps([1])])
def test_no_state_at_all_is_one_line(emulator, content):
    with pytest.raises(StateMismatch, match="no state of an environment"):
        emulator[0].set_state(content)


def test_a_state_is_unpacked_to_what_was_packed():
    state = pack_state({"a": [1, None]}, {"x": np.arange(5)})
    header, arrays = unpack_state(state)
    assert header == {"a": [1, None]} and list(arrays) == ["x"]
    np.testing.assert_array_equal(arrays["x"], np.arange(5))


def test_the_state_of_another_backend_is_a_clear_error():
    ale, envpool = (
        make_atari("Pong", AtariConfig(backend=name), num_envs=1, image_size=16, seed=0) for name in ("ale", "envpool")
    )
    ale.reset()
    with pytest.raises(ConfigError, match="the saved environment is .* use the saved settings"):
        envpool.set_state(ale.get_state())
