"""Bad input: whatever is given wrong gets one line that names it, what was given and what is accepted.

Flags, configurations in Python, garbage in a run's files, and arrays. Nothing is compiled here: functions of arrays are
traced over shapes, and what is wrong has to be said while they are.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import (
    agent,
    backbones,
    behaviour,
    checks,
    dfs,
    distributions,
    imagination,
    interop,
    latents,
    nn,
    optim,
    replay,
    vae,
    world_model,
)
from drama_jax import ssd as ssd_module
from drama_jax.action_space import Continuous
from drama_jax.behaviour import normalisers, ppo
from drama_jax.config import (
    AgentConfig,
    AtariConfig,
    AutoencoderConfig,
    BackboneConfig,
    BehaviourConfig,
    ConfigError,
    EvaluationConfig,
    Fidelity,
    ImaginationConfig,
    LoggingConfig,
    OptimizerConfig,
    ReplayConfig,
    RunConfig,
    TaskConfig,
    WorldModelConfig,
    preset,
)
from drama_jax.envs import jax_env, make_atari
from drama_jax.envs.base import check_actions, unpack_state
from drama_jax.envs.envpool_tasks import make_task
from drama_jax.training import checkpoint, evaluation, in_graph, programs, random_play, scores
from experiments import atari100k, atari_options

WM, AE, BB, BH = (
    "--agent.world-model",
    "--agent.world-model.autoencoder",
    "--agent.world-model.backbone",
    "--agent.behaviour",
)

# What is given after `--game Pong`, and what the line says.
FLAGS = [
    ("--steps 1e3", "--steps must be an integer, got '1e3'"),
    ("--steps nan", "--steps must be an integer, got 'nan'"),
    ("--steps -1", "--steps must be >= 0, got -1"),
    ("--steps", "--steps needs a value"),
    ("--steps=", "--steps must be an integer, got ''"),
    ("--steps 99999999999", "--steps must be an integer of at most 2147483647, got 99999999999"),
    ("--no-steps", "--no-steps; perhaps --steps"),
    ("--seed -1", "--seed must lie in [0, 2000000000], got -1"),
    ("--seed 2147483647", "--seed must lie in [0, 2000000000], got 2147483647"),
    ("--seed True", "--seed must be an integer, got 'True'"),
    ("--seed 0x10", "--seed must be an integer, got '0x10'"),
    ("--eval-episodes -1", "--eval-episodes must be >= 0, got -1"),
    ("--eval-episodes many", "--eval-episodes must be an integer, got 'many'"),
    ("--preset huge", "--preset: unknown preset 'huge'; accepted: tiny, xs, s, reference"),
    ("--preset", "--preset needs a value"),
    ("--env-backend gym", "--env-backend must be one of 'envpool', 'ale', got 'gym'"),
    ("--sampler best", "--sampler must be one of 'dfs', 'uniform', got 'best'"),
    ("--logdir", "--logdir needs a value"),
    ("Breakout", "--game: 'Breakout' is one value too many"),
    ("-x", "-x"),
    ("--agent 3", "--agent, 3; perhaps"),
    ("--agent.replay.tu 3", "--agent.replay.tu, 3; perhaps --agent.replay.tau"),
    ("--agent.replay.tau nan", "--agent.replay.tau must be a finite number, got nan"),
    ("--agent.replay.tau inf", "--agent.replay.tau must be a finite number, got inf"),
    ("--agent.replay.tau 1e39", "--agent.replay.tau must be a finite number, got 1e+39"),
    ("--agent.replay.tau 0", "--agent.replay.tau must be positive, got 0.0"),
    ("--agent.replay.tau ten", "--agent.replay.tau must be a number, got 'ten'"),
    ("--agent.replay.alpha -1", "--agent.replay.alpha must be >= 0, got -1.0"),
    ("--agent.replay.capacity 1e5", "--agent.replay.capacity must be an integer, got '1e5'"),
    (
        "--agent.replay.capacity 100",
        "--agent.replay.capacity must hold the 1033 steps before the first update, got 100",
    ),
    ("--agent.warmup-steps -5", "--agent.warmup-steps must be >= 0, got -5"),
    ("--agent.warmup-steps 9", "raise --agent.warmup-steps to 142"),
    ("--agent.acting-context 0", "--agent.acting-context must be positive, got 0"),
    ("--agent.imagination.horizon 0", "--agent.imagination.horizon must be positive, got 0"),
    ("--agent.imagination.unroll 0.5", "--agent.imagination.unroll must be an integer, got '0.5'"),
    ("--agent.imagination.batch-size 2000", "--agent.imagination: a batch of 2000 windows of 8 steps does not fit"),
    ("--agent.fidelity.reset-at-episode-start yes", "--agent.fidelity.reset-at-episode-start: 'yes' is one value too"),
    ("--agent.fidelity.reset-at-episode-start=no", "--agent.fidelity.reset-at-episode-start: 'no' is one value too"),
    (f"{WM}.batch-size 4000", f"{WM}: a batch of 4000 windows"),
    (f"{WM}.batch-length 1", f"{WM}.batch-length must be at least 2, got 1"),
    (f"{WM}.num-bins 2", f"{WM}.num-bins must be at least 3, got 2"),
    (f"{WM}.free-bits -1", f"{WM}.free-bits must be >= 0, got -1.0"),
    (f"{WM}.representation-scale nan", f"{WM}.representation-scale must be a finite number, got nan"),
    (
        f"{WM}.compute-dtype int8",
        f"{WM}.compute-dtype must be one of 'auto', 'float32', 'bfloat16', 'float64', got 'in",
    ),
    (f"{WM}.optimizer.b1 1", f"{WM}.optimizer.b1 must lie in [0, 1), got 1.0"),
    (f"{WM}.optimizer.b2 0", f"{WM}.optimizer.b2 must lie in (0, 1), got 0.0"),
    (f"{WM}.optimizer.learning-rate -inf", f"{WM}.optimizer.learning-rate must be a finite number, got -inf"),
    (f"{AE}.depths", f"{AE}.depths needs at least two entries, got ()"),
    (f"{AE}.depths 4 x", f"{AE}.depths must be numbers, got ['4', 'x']"),
    (f"{AE}.depths 4 -8", f"{AE}.depths must be positive, got (4, -8)"),
    (f"{AE}.image-size 63", f"{AE}.image-size must be a multiple of 16 for 5 depths, got 63"),
    (f"{AE}.image-channels 1", f"{AE}.image-channels must be 3 for Atari, got 1"),
    (f"{AE}.categoricals 2000000000", f"{AE}.categoricals * classes must be <= 2147483647"),
    (f"{AE}.unimix 1.5", f"{AE}.unimix must lie in [0, 1], got 1.5"),
    (f"{BB}.head-dim 60", f"{BB}.head-dim must divide expand * width = 1024, got 60"),
    (f"{BB}.num-layers 1000", f"{BB}.num-layers must be at most 100, got 1000"),
    (f"{BB}.name mamba3", f"{BB}.name must be one of 'mamba2', 'mamba', 'gru', 'transformer', 'rwkv', got 'mamba3'"),
    (f"{BB}.width 1e2", f"{BB}.width must be an integer, got '1e2'"),
    (f"{BH}.return-percentiles 0.1", f"{BH}.return-percentiles needs 2 values"),
    (f"{BH}.return-percentiles 0.1 0.2 0.3", f"{BH}.return-percentiles: '0.3' is one value too many"),
    (f"{BH}.return-percentiles 0.9 0.1", f"{BH}.return-percentiles must satisfy 0 < low < high < 1, got (0.9, 0.1)"),
    (f"{BH}.return-percentiles 0.1 nan", f"{BH}.return-percentiles must be a tuple of finite numbers"),
    (f"{BH}.lambda 0.9", f"{BH}.lambda, 0.9; perhaps {BH}.lambda_"),
    (f"{BH}.lambda_ 1.1", f"{BH}.lambda_ must lie in [0, 1], got 1.1"),
    ("--atari.sticky-actions 2", "--atari.sticky-actions must lie in [0, 1], got 2.0"),
    ("--atari.noop-max -1", "--atari.noop-max must be >= 0, got -1"),
    ("--atari.frame-skip 0", "--atari.frame-skip must be positive, got 0"),
    ("--atari.full-action-space 1", "--atari.full-action-space: '1' is one value too many"),
    ("--evaluation.num-envs 5000", "--evaluation.num-envs must be at most 4096, got 5000"),
    ("--logging.metrics-every 0", "--logging.metrics-every must be positive, got 0"),
    ("--logging.tensorboard maybe", "--logging.tensorboard: 'maybe' is one value too many"),
]


@pytest.mark.parametrize(("text", "line"), FLAGS)
def test_a_wrong_flag_is_one_line(text, line, capsys):
    with pytest.raises(ConfigError) as error:
        atari_options.parse(["--game", "Pong", *text.split()], "program")
    message = str(error.value)
    assert line in message and message.splitlines() == [message]
    assert capsys.readouterr() == ("", "")


# Through the program: what is found before anything is created.
COMMANDS = [
    ("", "--game is missing"),
    ("--game Brekout", "--game: unknown game 'Brekout': did you mean Breakout"),
    ("--game Pong --steps x", "--steps must be an integer, got 'x'"),
    (
        "--game Pong --agent.replay.capacity 2147483647",
        "--agent.replay.capacity 2147483647: needs 26,426,933,759,990 of",
    ),
    ("--game Pong --agent.behaviour.actor-units 2147483647", "--agent.behaviour (sizes): needs"),
    ("--game Pong --agent.imagination.horizon 2147483647", "--agent.imagination.horizon 2147483647: needs"),
    ("--game Pong --agent.acting-context 2147483647", "--agent.acting-context 2147483647: needs"),
    (f"--game Pong {BB}.width 1073741760", "--agent.world-model (sizes): needs"),
    (f"--game Pong {AE}.image-size 176", f"{AE}.image-size must be an integer from 1 to 160, got 176"),
    (f"--game Pong {WM}.compute-dtype float64", "--agent.behaviour.compute-dtype 'float64' needs JAX's 64-bit types"),
    ("--game Pong --compilation-cache ~nobody-of-this-name/x", "--compilation-cache ~nobody-of-this-name/x"),
    (f"--game Pong --logdir {'a' * 300}", "File name too long"),
    ("--game Pong --logdir /dev/null/runs", "--logdir /dev/null/runs: /dev/null is a file; name a directory"),
    ("--game Pong --logdir x\0y", "--logdir 'x\\x00y': a path has no zero bytes"),
]


@pytest.mark.parametrize(("text", "line"), COMMANDS)
def test_a_wrong_command_costs_a_second_and_leaves_nothing(text, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = text.split(" ") if text else []
    keep = [] if "--compilation-cache" in arguments else ["--compilation-cache", "None"]
    assert atari100k.main([*arguments, *keep]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.splitlines(True) == [output.err]
    assert line in output.err
    assert list(tmp_path.iterdir()) == []


def test_the_same_in_a_process_of_its_own(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-m", "experiments.atari100k", "--game", "Pong", "--agent.replay.tau", "nan"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --agent.replay.tau must be a finite number, got nan; see --help\n"
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_keeps_no_compiled_programs(monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    options, _ = atari_options.parse(["--game", "Pong"], "program")
    assert options.compilation_cache is None


def test_a_device_that_runs_out_of_memory_says_so(monkeypatch, capsys):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 5 bytes.")

    monkeypatch.setattr(atari100k, "run", exhausted)
    assert atari100k.main(["--game", "Pong"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Out of memory allocating 5 bytes." in error and "--agent.replay.cap" in error


CONFIGURATIONS = [
    (
        lambda: OptimizerConfig(learning_rate="4e-5"),
        "OptimizerConfig.learning_rate must be a finite number, got '4e-5'",
    ),
    (lambda: OptimizerConfig(learning_rate=True), "OptimizerConfig.learning_rate must be a finite number, got True"),
    (lambda: OptimizerConfig(learning_rate=0.0), "OptimizerConfig.learning_rate must be positive, got 0.0"),
    (lambda: OptimizerConfig(eps=float("nan")), "OptimizerConfig.eps must be a finite number, got nan"),
    (lambda: OptimizerConfig(warmup_updates=1.5), "OptimizerConfig.warmup_updates must be an integer of at most"),
    (lambda: OptimizerConfig(warmup_updates=-1), "OptimizerConfig.warmup_updates must be >= 0, got -1"),
    (lambda: OptimizerConfig(max_grad_norm=10**400), "OptimizerConfig.max_grad_norm must be a finite number, got 1000"),
    (lambda: AutoencoderConfig(depths=[16, 32]), "AutoencoderConfig.depths must be a tuple of integers, got [16, 32]"),
    (
        lambda: AutoencoderConfig(depths=(16, 32.0)),
        "AutoencoderConfig.depths must be a tuple of integers, got (16, 32.0)",
    ),
    (lambda: AutoencoderConfig(depths=(2,) * 17), "AutoencoderConfig.depths needs at most 16 entries, got 17"),
    (lambda: AutoencoderConfig(image_size=np.int64(64)), "AutoencoderConfig.image_size must be an integer of at most"),
    (lambda: AutoencoderConfig(image_size=True), "AutoencoderConfig.image_size must be an integer of at most"),
    (
        lambda: AutoencoderConfig(reconstruction="l1"),
        "AutoencoderConfig.reconstruction must be one of 'squared_error', 'cross_entropy', got 'l1'",
    ),
    (
        lambda: AutoencoderConfig(reconstruction="cross_entropy", vector_size=3),
        "AutoencoderConfig.reconstruction must be squared_error for vector observations",
    ),
    (lambda: AutoencoderConfig(unimix=None), "AutoencoderConfig.unimix must be a finite number, got None"),
    (lambda: AutoencoderConfig(unimix=np.eye(2)), "got array([[1., 0.], [0., 1.]])"),
    (lambda: BackboneConfig(name=5), "'mamba2', 'mamba', 'gru', 'transformer', 'rwkv', got 5"),
    (lambda: BackboneConfig(name=["mamba2"]), "'mamba2', 'mamba', 'gru', 'transformer', 'rwkv', got ['mamba2']"),
    (lambda: BackboneConfig(mixer_width=-2), "BackboneConfig.mixer_width must be >= 0, got -2"),
    (lambda: BackboneConfig(feedforward_width=1.5), "BackboneConfig.feedforward_width must be an integer of at most"),
    (lambda: preset("xs", "lstm"), "'mamba2', 'mamba', 'gru', 'transformer', 'rwkv', got 'lstm'"),
    (lambda: preset("xs", behaviour="sac"), "BehaviourConfig.name must be one of 'actor_critic', 'ppo', got 'sac'"),
    (lambda: BehaviourConfig(epochs=0), "BehaviourConfig.epochs must be positive, got 0"),
    (lambda: BehaviourConfig(minibatch_size=-4), "BehaviourConfig.minibatch_size must be positive, got -4"),
    (lambda: BehaviourConfig(clip_ratio="0.2"), "BehaviourConfig.clip_ratio must be a finite number, got '0.2'"),
    (lambda: BackboneConfig(width=100), "BackboneConfig.head_dim must divide expand * width = 200, got 64"),
    (lambda: BackboneConfig(width=2**30, expand=2), "BackboneConfig.width * expand must be <= 2147483647"),
    (
        lambda: WorldModelConfig(autoencoder={}),
        "WorldModelConfig.autoencoder must be of type AutoencoderConfig, got {}",
    ),
    (
        lambda: WorldModelConfig(compute_dtype="float16"),
        "WorldModelConfig.compute_dtype must be one of 'auto', 'float32'",
    ),
    (lambda: WorldModelConfig(compute_dtype=jnp.float32), "WorldModelConfig.compute_dtype must be one of"),
    (
        lambda: ImaginationConfig(horizon="15"),
        "ImaginationConfig.horizon must be an integer of at most 2147483647, got",
    ),
    (lambda: BehaviourConfig(return_percentiles=(0.1,)), "return_percentiles must be a tuple of 2 finite numbers"),
    (lambda: BehaviourConfig(return_percentiles=0.1), "return_percentiles must be a tuple of finite numbers, got 0.1"),
    (lambda: BehaviourConfig(num_bins=2), "BehaviourConfig.num_bins must be at least 3, got 2"),
    (lambda: BehaviourConfig(discount=1.01), "BehaviourConfig.discount must lie in [0, 1], got 1.01"),
    (lambda: ReplayConfig(sampler="Dfs"), "ReplayConfig.sampler must be one of 'dfs', 'uniform', got 'Dfs'"),
    (
        lambda: ReplayConfig(capacity=2**31),
        "ReplayConfig.capacity must be an integer of at most 2147483647, got 214748",
    ),
    (lambda: Fidelity(weight_by_survival=1), "Fidelity.weight_by_survival must be True or False, got 1"),
    (lambda: Fidelity(weight_by_survival=np.bool_(True)), "Fidelity.weight_by_survival must be True or False, got"),
    (lambda: AgentConfig(replay=None), "AgentConfig.replay must be of type ReplayConfig, got None"),
    (lambda: AgentConfig(warmup_steps=-1), "AgentConfig.warmup_steps must be >= 0, got -1"),
    (lambda: AtariConfig(backend=None), "AtariConfig.backend must be one of 'envpool', 'ale', got None"),
    (lambda: AtariConfig(sticky_actions="0.25"), "AtariConfig.sticky_actions must be a finite number, got '0.25'"),
    (lambda: EvaluationConfig(num_envs=4097), "EvaluationConfig.num_envs must be at most 4096, got 4097"),
    (lambda: LoggingConfig(tensorboard="no"), "LoggingConfig.tensorboard must be True or False, got 'no'"),
    (lambda: RunConfig(seed=1.0), "RunConfig.seed must be an integer of at most 2147483647, got 1.0"),
    (lambda: RunConfig(agent=RunConfig()), "RunConfig.agent must be of type AgentConfig, got RunConfig("),
    (lambda: preset("XS"), "unknown preset 'XS'; accepted: tiny, xs, s, reference"),
    (lambda: dataclasses.replace(RunConfig(), steps=None), "RunConfig.steps must be an integer of at most"),
]


@pytest.mark.parametrize(("make", "line"), CONFIGURATIONS, ids=[line for _, line in CONFIGURATIONS])
def test_a_wrong_configuration_is_one_line(make, line):
    with pytest.raises(ConfigError) as error:
        make()
    assert line in str(error.value) and "\n" not in str(error.value)


MICRO = AgentConfig(
    world_model=WorldModelConfig(
        autoencoder=AutoencoderConfig(image_size=16, depths=(2, 4), categoricals=4, classes=4),
        backbone=BackboneConfig(width=16, num_layers=1, head_dim=8, state_dim=4, chunk_size=8),
        head_units=8,
        batch_size=2,
        batch_length=6,
        compute_dtype="float32",
    ),
    imagination=ImaginationConfig(batch_size=3, context_length=2, horizon=4, unroll=1),
    behaviour=BehaviourConfig(
        actor_layers=1, actor_units=8, critic_layers=1, critic_units=8, num_bins=5, compute_dtype="float32"
    ),
    replay=ReplayConfig(capacity=25),
    acting_context=4,
    warmup_steps=14,
)
WORLD, AUTO, F = MICRO.world_model, MICRO.world_model.autoencoder, MICRO.world_model.feature_size
AUTO_DTYPE = dataclasses.replace(WORLD, compute_dtype="auto")


@pytest.fixture(scope="module")
def shapes():
    """The state of a micro agent of 4 actions, as shapes."""
    return programs.shapes(MICRO, 4)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def frames(*shape):
    return jnp.zeros(shape, jnp.uint8)


def bools(*shape):
    return jnp.zeros(shape, bool)


def key(number=0):
    return jax.random.key(number)


def transition(**change):
    good = {"frame": frames(16, 16, 3), "action": ints(), "reward": ones(), "terminal": bools(), "first": bools()}
    return replay.Transition(**good | change)


def batch(*lead, **change):
    good = {"frames": frames(*lead, 16, 16, 3), "actions": ints(*lead), "rewards": ones(*lead)}
    return replay.Batch(**good | {"terminals": bools(*lead), "firsts": bools(*lead)} | change)


def act(s, **change):
    acting = agent.initial_acting(s, 2)
    good = {"state": s, "acting": acting, "frames": frames(2, 16, 16, 3), "key": key(), "first": bools(2)}
    return agent.act(**good | change)


def scan(**change):
    good = {"x": ones(2, 5, 4, 3), "dt": ones(2, 5, 4), "A": -ones(4), "B": ones(2, 5, 2, 6), "C": ones(2, 5, 2, 6)}
    return ssd_module.ssd(**good | change)


def scan_step(**change):
    good = {"state": ones(2, 4, 3, 6), "x": ones(2, 4, 3), "dt": ones(2, 4), "A": -ones(4)}
    return ssd_module.ssd_step(**good | {"B": ones(2, 2, 6), "C": ones(2, 2, 6)} | change)


def selective(**change):
    good = {"x": ones(2, 5, 4), "dt": ones(2, 5, 4), "A": -ones(4, 6), "B": ones(2, 5, 6), "C": ones(2, 5, 6)}
    return ssd_module.selective_scan(**good | change)


def selective_step(**change):
    good = {"state": ones(2, 4, 6), "x": ones(2, 4), "dt": ones(2, 4), "A": -ones(4, 6)}
    return ssd_module.selective_step(**good | {"B": ones(2, 6), "C": ones(2, 6)} | change)


def run_backbone(s, latent=None, action=None, *, actions=4, method="__call__", **options):
    module = backbones.make(WORLD.backbone, actions, jnp.float32)
    latent = ones(2, 5, 16) if latent is None else latent
    action = ints(2, 5) if action is None else action
    arguments = (options.pop("state"),) if method == "step" else ()
    return module.apply(
        {"params": s.world_model.params["backbone"]}, latent, action, *arguments, method=method, **options
    )


def recurrent(batch_size, **change):
    config = dataclasses.replace(WORLD.backbone, **change)
    return backbones.make(config, 4, jnp.float32).initial_state(batch_size)


def update_world_model(s, b=None, gumbel=None, segments=None, **options):
    b, gumbel = batch(2, 6) if b is None else b, ones(2, 6, 4, 4) if gumbel is None else gumbel
    return world_model.update(WORLD, s.world_model, b, gumbel, segments, **{"num_actions": 4} | options)


def update_behaviour(s, **change):
    good = {"config": MICRO.behaviour, "fidelity": MICRO.fidelity, "state": s.behaviour}
    good |= {"features": ones(3, 5, F), "actions": ints(3, 4), "rewards": ones(3, 4), "terminations": bools(3, 4)}
    return (ppo.update if "key" in change else behaviour.update)(**good | change)


def look(s, what, *arguments, **options):
    """A function of the world model's parameters."""
    return getattr(world_model, what)(WORLD, s.world_model.params, *arguments, **options)


def of_state(s, what, array, config=WORLD):
    return getattr(world_model, what)(config, s.world_model, array)


def coded(s, what, array, **options):
    """A function of the autoencoder's parameters."""
    statistics = () if what == "posterior" else (s.world_model.batch_stats,)
    options |= {"dtype": jnp.float32} | ({} if what == "posterior" else {"train": False})
    return getattr(vae, what)(AUTO, s.world_model.params, *statistics, array, **options)


# The function of a micro agent's state, and what the line says.
ARRAYS = [
    (lambda s: agent.init(0, MICRO, 4), "agent.init: key must be one PRNG key, as from jax.random.key(0), got 0"),
    (lambda s: agent.init(jax.random.split(key()), MICRO, 4), "key must be one PRNG key.* got an array key<fry> [2]"),
    (lambda s: agent.init(key(), RunConfig(), 4), "config must be of type AgentConfig, got a RunConfig"),
    (lambda s: agent.init(key(), MICRO, 0), "agent.init: num_actions must be an integer from 1 to 2147483647, got 0"),
    (
        lambda s: agent.init(key(), MICRO, 4.0),
        "agent.init: num_actions must be an integer from 1 to 2147483647, got 4.0",
    ),
    (lambda s: agent.init(key(), MICRO, jnp.int32(4)), "num_actions must be an integer .* got an array int32 []"),
    (
        lambda s: agent.init(key(), MICRO.with_compute_dtype("float64"), 4),
        "compute_dtype 'float64' needs JAX's 64-bit types: set JAX_ENABLE_X64=1",
    ),
    (lambda s: agent.observe(None, transition()), "agent.observe: state must be of type AgentState, got None"),
    (
        lambda s: agent.update(s, transition(frame=frames(16, 16, 1))),
        "frame must be uint8 [16, 16, 3], got uint8 [16, 16",
    ),
    (
        lambda s: agent.update(s, transition(frame=ones(16, 16, 3))),
        "frame must be uint8 [16, 16, 3], got float32 [16, 16",
    ),
    (lambda s: agent.update(s, transition(action=ints(1))), "action must be int32 [], got int32 [1]"),
    (lambda s: agent.update(s, transition(action=3)), "replay.add: action must be int32 [], got 3"),
    (lambda s: agent.update(s, transition(reward="1")), "replay.add: reward must be float32 [], got '1'"),
    (lambda s: agent.observe(s, transition(terminal=ones())), "terminal must be bool [], got float32 []"),
    (lambda s: agent.observe(s, {"frame": 0}), "replay.add: transition must be of type Transition, got a dict"),
    (
        lambda s: agent.train_behaviour(s.replay),
        "agent.train_behaviour: state must be of type AgentState, got a Replay",
    ),
    (lambda s: agent.initial_acting(s, -1), "agent.initial_acting: num_envs must be an integer from 1 .* got -1"),
    (
        lambda s: act(s, frames=frames(3, 16, 16, 3)),
        "agent.act: frames must be uint8 [E, 16, 16, 3], here [2, 16, 16, 3]",
    ),
    (lambda s: act(s, frames=[[0]]), "agent.act: frames must be uint8 [E, 16, 16, 3], got a list"),
    (lambda s: act(s, first=ints(2)), "agent.act: first must be bool [E], here [2], got int32 [2]"),
    (lambda s: act(s, acting=None), "agent.act: acting must be of type Acting or EncodedActing, got None"),
    (lambda s: act(s, key=ones(2)), "agent.act: key must be one PRNG key.* got an array float32 [2]"),
    (lambda s: agent.imagine(s, transition(), key()), "agent.imagine: context must be of type Batch, got a Transition"),
    (
        lambda s: agent.imagine(s, batch(3, 2, frames=frames(3, 2, 8, 8, 3)), key()),
        "frames must be uint8 [..., 16, 16, 3]",
    ),
    (lambda s: agent.imagine_video(s, batch(2, 6), key(), 6), "context must be an integer from 1 to 5, got 6"),
    (lambda s: agent.reconstruct(s, ones(2, 16, 16, 3), key()), "frames must be uint8 [..., 16, 16, 3], got float32"),
    (lambda s: replay.init(MICRO, (16, 16, 3)), "replay.init: config must be of type ReplayConfig, got a AgentConfig"),
    (
        lambda s: replay.init(MICRO.replay, (16, 16)),
        "replay.init: frame_shape must be (height, width, channels), or (entries",
    ),
    (lambda s: replay.init(MICRO.replay, (16, 0, 3)), "replay.init: width must be an integer from 1"),
    (lambda s: replay.gather(s.replay, ints(2, 2), 3), "replay.gather: starts must be integer [M], got int32 [2, 2]"),
    (lambda s: replay.gather(s.replay, ints(2), 26), "replay.gather: length must be an integer from 1 to 25, got 26"),
    (lambda s: replay.gather(s.replay, ones(2), 3), "replay.gather: starts must be integer [M], got float32 [2]"),
    (lambda s: replay.num_starts(s, 3), "replay.num_starts: replay must be of type Replay, got a AgentState"),
    (
        lambda s: replay.sample_training(MICRO.replay, s.replay, key(), 24, 3),
        "replay.sample_training: num must be an integer from 1 to 23, got 24",
    ),
    (
        lambda s: replay.sample_training(MICRO.replay, s.replay, key(), 4, 3, tau=-1.0),
        "dfs.training_logits: tau must be a number in [1e-30, inf], got -1.0",
    ),
    (
        lambda s: replay.sample_imagination(MICRO.replay, s.replay, key(), 4, True, 1.0),
        "replay.sample_imagination: length must be an integer from 1 to 25, got True",
    ),
    (
        lambda s: replay.sample_imagination(MICRO.replay, s.replay, key(), 4, 3, 0),
        "dfs.imagination_logits: ratio must be a number in [1e-30, inf], got 0",
    ),
    (lambda s: dfs.init(-1), "dfs.init: capacity must be an integer from 1 to 2147483647, got -1"),
    (
        lambda s: dfs.training_logits(ones(5), 1.0),
        "dfs.training_logits: trained must be integer [..., N], got float32 [5]",
    ),
    (
        lambda s: dfs.training_logits(ints(5), ones(5)),
        "tau must be a number .* or a scalar array, got an array float32 [5]",
    ),
    (
        lambda s: dfs.imagination_logits(ints(5), ints(4), 1.0, 1.0),
        "dfs.imagination_logits: imagined must be integer [..., N], here [5], got int32 [4]",
    ),
    (lambda s: dfs.sample(key(), ones(5), 5, 6), "dfs.sample: num must be an integer from 1 to 5, got 6"),
    (lambda s: dfs.sample(key(), ones(5, 5), 5, 2), "dfs.sample: logits must be float [N], got float32 [5, 5]"),
    (lambda s: dfs.sample_masked(key(), ones(5), bools(4), 2), "valid must be bool [N], here [5], got bool [4]"),
    (lambda s: dfs.largest(ones(5), 6), "dfs.largest: num must be an integer from 1 to 5, got 6"),
    (lambda s: dfs.increment(ints(5), ones(2)), "dfs.increment: indices must be integer [M], got float32 [2]"),
    (lambda s: scan(x=ones(2, 5, 4)), "ssd: x must be float [B, T, H, P], got float32 [2, 5, 4]"),
    (lambda s: scan(x=[1.0]), "ssd: x must be float [B, T, H, P], got a list"),
    (
        lambda s: scan(x=ones(2, 0, 4, 3), dt=ones(2, 0, 4), B=ones(2, 0, 2, 6), C=ones(2, 0, 2, 6)),
        "T must be an integer",
    ),
    (lambda s: scan(dt=ones(2, 6, 4)), "ssd: dt must be float [B, T, H], here [2, 5, 4], got float32 [2, 6, 4]"),
    (lambda s: scan(A=ones(2)), "ssd: A must be float [H], here [4], got float32 [2]"),
    (lambda s: scan(B=ones(2, 5, 3, 6), C=ones(2, 5, 3, 6)), "must divide the number of heads, got G=3 and H=4"),
    (lambda s: scan(C=ones(2, 5, 2, 6, dtype=jnp.bfloat16)), "ssd: C must be float32 [B, T, G, N], here [2, 5, 2, 6]"),
    (
        lambda s: scan(initial_state=ones(2, 4, 6, 3)),
        "initial_state must be float [B, H, P, N] or None, here [2, 4, 3, 6]",
    ),
    (lambda s: scan(segment_ids=bools(2, 5)), "ssd: segment_ids must be integer [B, T] or None, here [2, 5], got bool"),
    (lambda s: scan(chunk_size=0), "ssd: chunk_size must be an integer from 1"),
    (
        lambda s: scan(implementation="cuda"),
        "ssd: unknown implementation 'cuda'; accepted: None, 'reference', 'chunked', 'pallas'",
    ),
    (
        lambda s: scan(implementation="pallas"),
        "ssd: implementation 'pallas' cannot run: it needs an NVIDIA GPU of compute capability 8.0 or more",
    ),
    (lambda s: selective(x=ones(2, 5)), "selective_scan: x must be float [B, T, E], got float32 [2, 5]"),
    (lambda s: selective(A=ones(4)), "selective_scan: A must be float [E, N], here [4, N], got float32 [4]"),
    (lambda s: selective(C=ones(2, 5, 7)), "selective_scan: C must be float32 [B, T, N], here [2, 5, 6]"),
    (lambda s: selective(chunk_size=0), "selective_scan: chunk_size must be an integer from 1"),
    (
        lambda s: selective(implementation="pallas"),
        "selective_scan: unknown implementation 'pallas'; accepted: None, 'reference', 'chunked'",
    ),
    (lambda s: selective_step(state=ones(2, 4)), "selective_step: state must be float [B, E, N], here [2, 4, N]"),
    (lambda s: scan_step(state=ones(2, 4, 3)), "ssd_step: state must be float [B, H, P, N], here [2, 4, 3, N]"),
    (lambda s: scan_step(x=ints(2, 4, 3)), "ssd_step: x must be float [B, H, P], got int32 [2, 4, 3]"),
    (lambda s: scan_step(D=None, dt=ones(2)), "ssd_step: dt must be float [B, H], here [2, 4], got float32 [2]"),
    (lambda s: run_backbone(s, latent=ones(2, 16)), "backbone: latent must be float [B, T, S], got float32 [2, 16]"),
    (lambda s: run_backbone(s, latent=ones(2, 5, 9)), "are for S + A = 20, got latents of S = 9 and A = 4 actions"),
    (lambda s: run_backbone(s, action=ones(2, 5)), "backbone: action must be integer [B, T], here [2, 5], got float32"),
    (
        lambda s: run_backbone(s, action=ints(2, 5, 4)),
        "backbone: action must be integer [B, T], here [2, 5], got int32 [2",
    ),
    (lambda s: run_backbone(s, segment_ids=ints(2, 4)), "segment_ids must be integer [B, T] or None, here [2, 5], got"),
    (
        lambda s: run_backbone(s, state=recurrent(3)),
        "backbone, state: conv must be float [2, 3, 40], got float32 [3, 3, 40",
    ),
    (lambda s: run_backbone(s, state=recurrent(2, num_layers=2)), "backbone: state must have 1 layers, got 2"),
    (lambda s: run_backbone(s, state=ones(2)), "backbone: state must be of type Mamba2State, got an array float32 [2]"),
    (lambda s: run_backbone(s, method="open_window", horizon=0), "backbone: horizon must be an integer from 1"),
    (
        lambda s: run_backbone(s, ones(2, 16), ints(2), method="step", state=None),
        "backbone: state must be of type Mamba2State or Mamba2Window or GpuWindow, got None",
    ),
    (lambda s: run_backbone(s, actions=True), "num_actions must be at least 1, an integer, got True"),
    (lambda s: vae.init(key(), WORLD), "vae.init: config must be of type AutoencoderConfig, got a WorldModelConfig"),
    (
        lambda s: vae.frames_to_phases(ones(2, 16, 16, 3), jnp.float32),
        "frames must be uint8 [N, height, width, channels]",
    ),
    (
        lambda s: vae.frames_to_phases(frames(2, 15, 16, 3), jnp.float32),
        "x must have even height and width, got (2, 15",
    ),
    (
        lambda s: coded(s, "encode", ones(2, 16, 16, 3)),
        "vae.encode: phases must be float [N, 8, 8, 12], got float32 [2, 16",
    ),
    (
        lambda s: coded(s, "posterior", ones(2, 5)),
        "vae.posterior: embedding must be float [..., 256], got float32 [2, 5]",
    ),
    (lambda s: coded(s, "decode", ones(2, 4, 4)), "vae.decode: latent must be float [N, 16], got float32 [2, 4, 4]"),
    (
        lambda s: vae.posterior(AUTO, {}, ones(2, 256), dtype=jnp.float32),
        "params must have posterior_head; .* from nothing",
    ),
    (
        lambda s: world_model.init(key(), MICRO, 4),
        "world_model.init: config must be of type WorldModelConfig, got a Agent",
    ),
    (lambda s: world_model.init(key(), AUTO_DTYPE, 4), "compute_dtype is 'auto' here; decide it with agent.resolve"),
    (
        lambda s: of_state(s, "posterior", frames(16, 16)),
        "world_model.posterior: frames must be uint8 [..., 16, 16, 3], got",
    ),
    (lambda s: of_state(s, "embed", frames(16, 16)), "world_model.embed: frames must be uint8 [..., 16, 16, 3], got"),
    (
        lambda s: latents.sample_prior(WORLD, s.world_model.params, key(), ones(2, 3)),
        "latents.sample_prior: features must be float [..., 16], got float32 [2, 3]",
    ),
    (
        lambda s: latents.sample_posterior(WORLD, s.world_model, 3, frames(2, 16, 16, 3)),
        "latents.sample_posterior: key must be one PRNG key",
    ),
    (
        lambda s: behaviour.sample_actions(
            MICRO.behaviour, s.behaviour.params, s.behaviour.normaliser, [ones(2, 3), ones(3, 3)], key()
        ),
        "behaviour.sample_actions: parts[1] must be float [B, F1], here [2, F1], got float32 [3, 3]",
    ),
    (
        lambda s: of_state(s, "decode", ones(2, 4, 4)),
        "world_model.decode: latent must be float [..., 16], got float32 [2,",
    ),
    (
        lambda s: of_state(s, "decode", ones(2, 16), MICRO),
        "world_model.decode: config must be of type WorldModelConfig",
    ),
    (lambda s: look(s, "observe", ones(2, 5, 9), ints(2, 5), num_actions=4), "latent must be float [B, T, 16], got"),
    (
        lambda s: look(s, "observe", ones(2, 5, 16), ints(2, 4), num_actions=4),
        "actions must be integer [B, T], here [2, 5]",
    ),
    (
        lambda s: look(s, "observe", ones(2, 5, 16), ints(2, 5), num_actions=5),
        "S + A = 20, got latents of S = 16 and A = 5",
    ),
    (
        lambda s: world_model.observe(WORLD, s.world_model, ones(2, 5, 16), ints(2, 5), num_actions=4),
        "world_model.observe: params must be a dict with backbone, got a WorldModelState",
    ),
    (
        lambda s: look(s, "step", recurrent(2), ones(2, 5, 16), ints(2, 5), num_actions=4),
        "world_model.step: latent must be float [B, 16], got float32 [2, 5, 16]",
    ),
    (
        lambda s: look(s, "prior", ones(2, 15)),
        "world_model.prior: features must be float [..., 16], got float32 [2, 15]",
    ),
    (
        lambda s: look(s, "reward_logits", ints(2, 16)),
        "world_model.reward_logits: features must be float [..., 16], got",
    ),
    (
        lambda s: look(s, "termination_logits", None),
        "world_model.termination_logits: features must be float [..., 16], got",
    ),
    (
        lambda s: update_world_model(s, batch(2, 6, frames=frames(2, 6, 32, 32, 3))),
        "frames must be uint8 [B, T, 16, 16, 3]",
    ),
    (
        lambda s: update_world_model(s, batch(2, 6, actions=ints(2, 5))),
        "actions must be integer [B, T], here [2, 6], got",
    ),
    (
        lambda s: update_world_model(s, batch(2, 6, rewards=ints(2, 6))),
        "world_model.losses: rewards must be float [B, T]",
    ),
    (
        lambda s: update_world_model(s, batch(2, 6, terminals=ones(2, 6))),
        "terminals must be bool [B, T], here [2, 6], got",
    ),
    (
        lambda s: update_world_model(s, gumbel=ones(2, 6, 16)),
        "gumbel must be float [B, T, 4, 4], here [2, 6, 4, 4], got",
    ),
    (
        lambda s: update_world_model(s, segments=ones(2, 6)),
        "segment_ids must be integer [B, T] or None, here [2, 6], got",
    ),
    (lambda s: update_world_model(s, b=[]), "world_model.loss: batch must be of type Batch, got a list"),
    (
        lambda s: update_world_model(s, learning_rate=-1.0),
        "warmup: learning_rate must be a number in [0, inf], got -1.0",
    ),
    (lambda s: behaviour.init(key(), MICRO.behaviour, 0, 4), "behaviour.init: feature_size must be an integer from 1"),
    (lambda s: behaviour.init(key(), BehaviourConfig(), 8, 4), "compute_dtype is 'auto' here"),
    (
        lambda s: update_behaviour(s, features=ones(3, 4, F)),
        "behaviour.update: features must be float [B, 5, 32], here [3",
    ),
    (
        lambda s: update_behaviour(s, features=ones(3, 5, 7)),
        "behaviour.update: features must be float [B, 5, 32], here [3",
    ),
    (
        lambda s: update_behaviour(s, actions=ones(3, 4)),
        "behaviour.update: actions must be integer [B, L], got float32",
    ),
    (
        lambda s: update_behaviour(s, rewards=ones(3, 5)),
        "behaviour.update: rewards must be float [B, L], here [3, 4], got",
    ),
    (
        lambda s: update_behaviour(s, terminations=ints(3, 4)),
        "terminations must be bool [B, L], here [3, 4], got int32",
    ),
    (
        lambda s: update_behaviour(s, state=s),
        "behaviour.update: state must be of type BehaviourState, got a AgentState",
    ),
    (lambda s: update_behaviour(s, key=3), "ppo.update: key must be one PRNG key, as from jax.random.key(0), got 3"),
    (
        lambda s: update_behaviour(s, key=key(), rewards=ones(3, 5)),
        "ppo.update: rewards must be float [B, L], here [3, 4]",
    ),
    (lambda s: update_behaviour(s, fidelity=None), "behaviour.update: fidelity must be of type Fidelity, got None"),
    (
        lambda s: behaviour.policy_logits(MICRO.behaviour, s.behaviour.params, s.behaviour.normaliser, ones(2, 7)),
        "behaviour.policy_logits: features must be float [..., 32], got float32 [2, 7]",
    ),
    (
        lambda s: behaviour.value_logits(MICRO.behaviour, s.behaviour.params, ones(2, F)),
        "behaviour.value_logits: critic must have hidden_0, output; hidden_0, output is missing from actor, critic",
    ),
    (
        lambda s: behaviour.lambda_returns(ones(3), ones(3), ones(3), 0.9, 0.9),
        "lambda_returns: values must be float [4]",
    ),
    (
        lambda s: behaviour.lambda_returns(ones(3), ones(4), ones(3), 1.5, 0.9),
        "discount must be a number in [0, 1], got 1",
    ),
    (lambda s: behaviour.survival(bools(3)), "survival: continues must be float [..., T], got bool [3]"),
    (
        lambda s: normalisers.update(s.behaviour.normaliser, ones(2, 3)),
        "normalisers.update: features must be float [..., 3",
    ),
    (lambda s: distributions.two_hot(ints(3), 5), "two_hot: x must be float [...], got int32 [3]"),
    (lambda s: distributions.two_hot(ones(3), 1), "two_hot_bins: num_bins must be an integer from 2"),
    (
        lambda s: distributions.two_hot_decode(ones()),
        "two_hot_decode: logits must be float [..., bins], got float32 []",
    ),
    (
        lambda s: distributions.two_hot_loss(ones(3, 5), ones(2)),
        "two_hot_loss: x must be float [...], here [3], got float",
    ),
    (lambda s: distributions.unimix(ones(3), 0.1), "unimix: logits must be float [..., K, C], got float32 [3]"),
    (lambda s: distributions.unimix(ones(3, 3), 2.0), "unimix: ratio must be a number in [0, 1], got 2.0"),
    (
        lambda s: distributions.straight_through(ones(3, 3), ones(3, 2)),
        "gumbel must be float [..., K, C], here [3, 3], got",
    ),
    (lambda s: distributions.sample_one_hot(None, ones(3)), "sample_one_hot: key must be one PRNG key, .* got None"),
    (
        lambda s: distributions.categorical_kl(ones(3, 3), ones(3)),
        "q_log must be float [..., K, C], here [3, 3], got float",
    ),
    (
        lambda s: distributions.free_bits_kl(ones(3, 3), ones(3, 3), -1.0),
        "free_bits must be a number in [0, inf], got -1",
    ),
    (
        lambda s: distributions.free_bits_kl(ones(2, 3, 3), ones(2, 3, 3), 1.0, ones(3)),
        "weight must be float [2] or None",
    ),
    (
        lambda s: distributions.binary_cross_entropy(ones(2), "no"),
        "labels must be an array [...], got 'no'",
    ),
    (lambda s: distributions.categorical_entropy(3.0), "categorical_entropy: logits must be float [..., A], got 3.0"),
    (lambda s: imagination.rollout(None, None, (0, 0), 3, key()), "rollout: model and policy must be functions"),
    (lambda s: imagination.rollout(max, max, (0, 0), 0, key()), "rollout: horizon must be an integer from 1"),
    (lambda s: optim.clip_by_global_norm(-1.0), "clip_by_global_norm: max_norm must be a number in [0, inf], got -1.0"),
    (lambda s: optim.laprop(1e-3, b1=1.0), "laprop needs 0 <= b1 < 1 and 0 < b2 < 1, got b1=1.0, b2=0.999"),
    (
        lambda s: optim.laprop("fast"),
        "laprop: learning_rate must be a number in [0, inf] or a scalar array, got 'fast'",
    ),
    (
        lambda s: optim.make_optimizer(MICRO),
        "make_optimizer: config must be of type OptimizerConfig, got a AgentConfig",
    ),
    (
        lambda s: optim.laprop(1e-3).init({"a": ones(2), "b": ints(2)}),
        "the optimiser's parameters must be arrays of one dtype, got float32, int32",
    ),
    (
        lambda s: nn.space_to_depth(ones(4, 4, 3)),
        "space_to_depth: x must be an array [N, 2h, 2w, C], got float32 [4, 4, 3]",
    ),
    (
        lambda s: nn.depth_to_space(ones(1, 4, 4, 3)),
        "depth_to_space: x must have a multiple of four channels, got (1, 4, 4",
    ),
    (
        lambda s: nn.conv3x3(ones(1, 4, 4, 3), ones(3, 3, 4, 5)),
        "kernel must be float32 [3, 3, I, O], here [3, 3, 3, O], got",
    ),
    (
        lambda s: nn.conv_stride2(ones(1, 4, 4, 3), ones(3, 3, 4, 5)),
        "kernel must be float [5, 5, I, O], got float32 [3, 3",
    ),
    (lambda s: in_graph.run(MICRO, None, key(), steps=3), "in_graph.run: env must be of type JaxEnv, got None"),
    (lambda s: in_graph.run({}, None, key(), steps=3), "in_graph.run: config must be of type AgentConfig, got a dict"),
    (lambda s: in_graph.begin(MICRO, "Catch", key()), "in_graph.begin: env must be of type JaxEnv, got 'Catch'"),
    (lambda s: in_graph.play_randomly(None, 3, None), "in_graph.play_randomly: env must be of type JaxEnv, got None"),
    (lambda s: in_graph.train(None, 3, s), "in_graph.train: env must be of type JaxEnv, got None"),
    (lambda s: random_play.play(None, key(), episodes=3), "random_play.play: env must be of type JaxEnv, got None"),
    (lambda s: evaluation.episodes_per_environment(-1, 2), "evaluation: episodes must be an integer from 0"),
    (lambda s: evaluation.episodes_per_environment(5, 0), "evaluation: num_envs must be an integer from 1"),
    (lambda s: scores.human_normalised(3, 1.0), "human_normalised: game must be of type str, got 3"),
    (lambda s: scores.human_normalised("Pong", float("nan")), "score must be a number in .* got nan"),
    (lambda s: scores.summary("Pong", [1.0, "2"]), "scores: returns[1] must be a number in .*, got '2'"),
    (lambda s: scores.summary("Pong", 3.0), "scores: returns must be of type list or tuple, got 3.0"),
    (lambda s: checkpoint.load_weights(5), "checkpoint: path must be of type str or Path, got 5"),
    (
        lambda s: checkpoint.load_weights("runs", step="20"),
        "checkpoint: step must be of type int or None, got '20'",
    ),
    (lambda s: check_actions([[0, 1], [2]], 2, 4), "actions must be 2 integers, got [[0, 1], [2]]"),
    (lambda s: check_actions(np.array([0, 4]), 2, 4), "actions must lie in [0, 4), got [0, 4]"),
    (lambda s: check_actions(np.array([0.0]), 1, 4), "actions must be 1 integers of shape (1,), got float64 (1,)"),
    (lambda s: unpack_state("state"), "the saved environment must be bytes, as from get_state, got a str"),
    (lambda s: make_atari("Pong", {}, num_envs=1, image_size=16, seed=0), "config must be an AtariConfig, got a dict"),
    (
        lambda s: make_atari(5, AtariConfig(), num_envs=1, image_size=16, seed=0),
        "a game's name must be a string, got 5",
    ),
    (
        lambda s: check_actions(np.ones((1, 2)), 1, Continuous(3)),
        "actions must be 1 floats of shape (1, 3), got float64",
    ),
    (lambda s: check_actions(np.full((1, 2), 1.5), 1, Continuous(2)), "actions must lie in [-1, 1], got [[1.5, 1.5]]"),
    (
        lambda s: make_task("CheetahRun-v1", {}, num_envs=1, image_size=16, seed=0),
        "config must be a TaskConfig, got a dict",
    ),
    (lambda s: make_task(5, TaskConfig(), num_envs=1, image_size=16, seed=0), "has no task 5"),
    (lambda s: jax_env.make("Catch-bsuite", image_size=-1), "image_size must be a positive integer, got -1"),
    (lambda s: jax_env.make(None, image_size=10), "gymnax has no environment None"),
]


@pytest.mark.parametrize(("call", "line"), ARRAYS, ids=[line for _, line in ARRAYS])
def test_wrong_arguments_are_one_line(call, line, shapes):
    with pytest.raises((ValueError, TypeError)) as error:
        jax.eval_shape(lambda state: call(state) and None, shapes)
    message = str(error.value)
    wanted = ".*".join(re.escape(part) for part in line.split(".*"))
    assert re.search(wanted, message), message
    assert message.splitlines() == [message] and type(error.value) in (ValueError, TypeError, ConfigError)
    # Said by this package, not by what it calls.
    assert "/drama_jax/" in traceback.extract_tb(error.value.__traceback__)[-1].filename


def test_what_fits_is_let_through(shapes):
    """The right-hand side of the table above: the same calls without the mistake."""

    def everything(s):
        act(s), scan(), scan_step(), run_backbone(s), run_backbone(s, state=recurrent(2)), update_world_model(s)
        update_behaviour(s), update_behaviour(s, key=key()), agent.update(s, transition())
        agent.imagine(s, batch(3, 2), key())
        agent.imagine_video(s, batch(2, 6), key(), 5), agent.reconstruct(s, frames(2, 16, 16, 3), key())
        look(s, "prior", ones(2, 16)), look(s, "step", recurrent(2), ones(2, 16), ints(2), num_actions=4)
        run_backbone(s, ones(2, 16), ints(2), method="step", state=recurrent(2)), coded(s, "decode", ones(2, 16))
        act(s, key=jax.random.PRNGKey(0))
        return ()

    assert jax.eval_shape(everything, shapes) == ()


def test_the_checks_hold_under_vmap_and_cost_nothing(shapes):
    """Shapes are those of one example, and the program is the same as without a check."""
    several = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), shapes.replay)
    steps = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), transition())
    jax.eval_shape(jax.vmap(replay.add), several, steps)
    with pytest.raises(ValueError, match="action must be int32 "):
        jax.eval_shape(jax.vmap(replay.add), several, dataclasses.replace(steps, action=ints(2, 1)))
    with pytest.MonkeyPatch.context() as patch:
        checked = str(jax.make_jaxpr(lambda: scan())())
        patch.setattr(checks, "arrays", lambda *_, **__: None)
        assert str(jax.make_jaxpr(lambda: scan())()) == checked


def released():
    """The state dict of a small released world model and actor."""
    rng = np.random.default_rng(0)
    sizes = {
        "encoder.backbone.0.weight": (2, 3, 5, 5), "encoder.backbone.0.bias": (2,),
        "encoder.backbone.1.weight": (2,), "encoder.backbone.1.bias": (2,),
        "encoder.backbone.3.weight": (4, 2, 5, 5), "encoder.backbone.3.bias": (4,),
        "encoder.backbone.4.weight": (4,), "encoder.backbone.4.bias": (4,),
        "encoder.backbone.4.running_mean": (4,), "encoder.backbone.4.running_var": (4,),
        "encoder.backbone.4.num_batches_tracked": (),
        "dist_head.post_head.weight": (6, 16), "dist_head.post_head.bias": (6,),
        "dist_head.prior_head.weight": (6, 5), "dist_head.prior_head.bias": (6,),
        "image_decoder.backbone.0.weight": (16, 6), "image_decoder.backbone.0.bias": (16,),
        "image_decoder.backbone.2.weight": (4,), "image_decoder.backbone.2.bias": (4,),
        "image_decoder.backbone.4.weight": (4, 2, 5, 5), "image_decoder.backbone.4.bias": (2,),
        "image_decoder.backbone.5.weight": (2,), "image_decoder.backbone.5.bias": (2,),
        "image_decoder.backbone.7.weight": (2, 3, 5, 5), "image_decoder.backbone.7.bias": (3,),
        "reward_decoder.backbone.0.weight": (7, 5), "reward_decoder.backbone.0.bias": (7,),
        "reward_decoder.backbone.1.scale": (7,), "reward_decoder.head.weight": (9, 7), "reward_decoder.head.bias": (9,),
        "actor.1.weight": (8, 5), "actor.1.bias": (8,), "actor.2.scale": (8,), "actor.4.weight": (3, 8),
        "actor.4.bias": (3,),
    }  # fmt: skip
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in sizes.items()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"encoder.backbone.3.bias": None}, "from_torch: encoder.backbone.3.bias is missing"),
        ({"encoder.backbone.1.weight": None, "encoder.backbone.1.bias": None}, "encoder.backbone.1.weight is missing"),
        ({"encoder.backbone.4.running_var": None}, "from_torch: encoder.backbone.4.running_var is missing"),
        ({"encoder.backbone.6.weight": (4, 4, 5, 5)}, "from_torch knows no array named encoder.backbone.6.weight"),
        (
            {"encoder.backbone.3.weight": (4, 3, 5, 5)},
            "encoder.backbone.3.weight must be an array [4, 2, 5, 5], got float",
        ),
        (
            {"encoder.backbone.0.weight": (2, 75)},
            "encoder.backbone.0.weight must be an array [2, in, 5, 5], got float64 [2",
        ),
        (
            {"dist_head.post_head.bias": (5,)},
            "dist_head.post_head.bias must be an array [out], here [6], got float64 [5]",
        ),
        ({"dist_head.post_head.weight": (6, 15)}, "from_torch: 15 features are no square map of 4 channels"),
        ({"image_decoder.backbone.0.bias": None}, "from_torch: image_decoder.backbone.0.bias is missing"),
        (
            {"image_decoder.backbone.7.weight": (3, 3, 5, 5)},
            "image_decoder.backbone.7.weight must be an array [2, out, 5, 5]",
        ),
        ({"reward_decoder.backbone.1.scale": None}, "from_torch: reward_decoder.backbone.1.scale is missing"),
        (
            {"reward_decoder.backbone.1.scale": (6,)},
            "reward_decoder.backbone.1.scale must be an array [7], got float64 [6]",
        ),
        ({"reward_decoder.tail.bias": (9,)}, "from_torch knows no array named reward_decoder.tail.bias"),
        ({"optimizer.step": ()}, "from_torch knows no array named optimizer.step; expected released Drama names"),
        ({"actor.4.weight": (3, 7)}, "from_torch: 4.weight must be an array [out, 8], got float64 [3, 7]"),
        ({"actor.9.weight": (3, 7)}, "not the arrays of a released actor or critic: missing or not known: "),
        (
            {"sequence_model.backbone.stem.0.weight": (3, 7)},
            "sequence model weights: missing ['norm_f.weight', 'stem.0.",
        ),
    ],
)
def test_released_weights_that_do_not_fit_are_named(change, line):
    interop.from_torch(released())
    arrays = {name: array for name, array in released().items() if name not in change}
    arrays |= {name: np.zeros(shape) for name, shape in change.items() if shape is not None}
    with pytest.raises(ValueError) as error:
        interop.from_torch(arrays)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_released_weights_are_a_mapping():
    with pytest.raises(TypeError, match="arrays must be a mapping from names to arrays, got a list"):
        interop.from_torch([np.zeros(3)])
