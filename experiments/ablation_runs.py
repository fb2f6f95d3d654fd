"""The runs of one variant of `experiments.ablate`, and what they come to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from drama_jax import agent
from drama_jax.behaviour import networks
from drama_jax.config import AgentConfig, ConfigError
from drama_jax.config import preset as atari_preset
from drama_jax.envs.games import canonical_game
from drama_jax.envs.jax_env import JaxEnv
from drama_jax.training import checkpoint, in_graph, metrics_file, programs, resume, weights
from drama_jax.training.together import Together
from experiments import atari100k, atari_options, jax_curves, jax_env, jax_options, sweep
from experiments.exits import Failed
from experiments.sweep import Settings

__all__ = ["Failed", "Plan", "Result", "agent_of", "check", "object_errors", "run", "update_memory"]

_PROGRAM = "python -m experiments.ablate"
_SHOWN = 512
"""Random steps whose frames the error on objects is measured on."""
_DIFFERENT = 0.05
"""How far a pixel is from its median over all frames where something is on it; 1 is from black to white."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a variant: one command with all its seeds."""

    name: str
    """The environment or the game."""
    variant: str
    arguments: tuple[str, ...]
    """Of `experiments.jax_env` or `experiments.atari100k`."""
    atari: bool
    objects: bool
    """Whether to measure the autoencoder's error on small objects."""
    memory: bool
    """Whether to ask the compiler what an update needs."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What the runs of a variant came to; a list has an entry per seed."""

    name: str
    variant: str
    steps: int
    final_returns: list[float | None]
    """Mean over the episodes of the last tenth; with --game, of the evaluation."""
    curve_steps: list[float]
    curves: list[list[float | None]]
    ms_per_step: float
    """Of one seed, when all are trained together: the median of what was logged, so without compilation."""
    parameters: int
    """Of world model, actor and critic."""
    reconstruction: float
    """Mean loss over the last tenth of the steps and the seeds."""
    object_errors: list[tuple[float, float]]
    """Mean squared error of the reconstruction, 0..1 a pixel, where something is and elsewhere; [] if not measured."""
    device: str
    commit: str | None
    memory_bytes: int | None = None
    """While one agent is updated, its state and replay included, by the compiled program's account."""


def agent_of(name: str, preset: str, *, atari: bool) -> AgentConfig:
    """The agent that the variants vary.

    Raises:
      ConfigError: if there is no such environment or preset.
    """
    if atari:
        return atari_preset(preset).agent
    return jax_options.parse(["--env", name, "--preset", preset])[1].agent


def check(plan: Plan) -> None:
    """Raises a ConfigError if the command would; begins nothing."""
    if plan.atari:
        options, atari = atari_options.parse(list(plan.arguments), _PROGRAM)
        sweep.plan(atari, options.seeds, options.sweep)
        return
    _, config, _ = jax_options.parse(plan.arguments)
    if plan.objects and config.agent.world_model.autoencoder.vector_size:
        raise ConfigError(f"--envs {plan.name}: it shows vectors, and no objects; name one that shows a board")


def run(plan: Plan, stop: Callable[[], bool]) -> Result | None:
    """Runs what is left of a variant; None if `stop` has ended it.

    Raises:
      ConfigError: if it cannot start.
      Failed: if it failed on the way.
    """
    if plan.atari:
        varied = atari_options.parse(list(plan.arguments), _PROGRAM)[1].agent
        directories = _atari(plan)
        errors: list[tuple[float, float]] = []
    else:
        options, config, env = jax_options.parse(plan.arguments)
        varied = config.agent
        directories = _finished(plan.name.rpartition(":")[2], options, config)
        directories = directories or jax_env.run(options, config, env, stop) or []
        errors = [object_errors(path, varied, env) for path in directories] if plan.objects else []
    if not directories:
        return None
    result = _result(plan, directories, errors)
    memory = update_memory(varied, checkpoint.load_weights(directories[0])) if plan.memory else None
    return dataclasses.replace(result, memory_bytes=memory)


def _atari(plan: Plan) -> list[pathlib.Path]:
    """The run directories of all seeds, trained and evaluated; [] if a signal has ended it."""
    options, config = atari_options.parse(list(plan.arguments), _PROGRAM)
    game = canonical_game(plan.name)
    directories = _finished(game, options, config)
    if not directories and atari100k.main(plan.arguments) != 0:
        raise Failed(f"{plan.name}, {plan.variant}: the run failed, see above")
    return directories or _finished(game, options, config)


def _finished(
    name: str, options: jax_options.Options | atari_options.AllOptions, config: Settings
) -> list[pathlib.Path]:
    """The newest finished run of each seed; [] if one has none.

    Raises:
      ConfigError: if one is there, but with other settings.
    """
    found = []
    for seed in range(config.seed, config.seed + options.seeds):
        paths = sorted(options.logdir.glob(f"{name}/{options.preset}/seed{seed}-*"), reverse=True)
        for path in [path for path in paths if resume.scored(path) == config.steps][:1]:
            try:
                resume.check(path, name, options.preset, dataclasses.replace(config, seed=seed))
            except ConfigError as error:
                raise ConfigError(f"{str(error).partition(';')[0]}; name another --out") from None
            found.append(path)
    return found if len(found) == options.seeds else []


def _result(plan: Plan, directories: Sequence[pathlib.Path], errors: list[tuple[float, float]]) -> Result:
    summaries = [json.loads((path / "scores.json").read_text(encoding="utf-8")) for path in directories]
    lines = [metrics_file.read(path) for path in directories]
    steps = int(max(line["step"] for line in lines[0]))
    edges = np.linspace(0, steps, 41)
    episodes = [jax_curves.episodes(path) for path in directories]
    if plan.atari:
        final = [summary["mean"] for summary in summaries]
    else:
        final = [jax_curves.mean_between(one, 0.9 * steps, steps) for one in episodes]
    tag = "world_model/reconstruction_loss"
    losses = [line[tag] for rows in lines for line in rows if tag in line and line["step"] > 0.9 * steps]
    times = [1 / line["charts/SPS"] for line in lines[0] if line.get("charts/SPS")]
    return Result(
        name=plan.name,
        variant=plan.variant,
        steps=steps,
        final_returns=final,
        curve_steps=edges[1:].tolist(),
        curves=[
            [jax_curves.mean_between(one, low, high) for low, high in itertools.pairwise(edges)] for one in episodes
        ],
        ms_per_step=1e3 * float(np.median(times)) / len(directories) if times else float("nan"),
        parameters=_parameters(checkpoint.load_weights(directories[0])),
        reconstruction=float(np.mean(losses)) if losses else float("nan"),
        object_errors=errors,
        device=str(summaries[0].get("device", "")),
        commit=summaries[0].get("commit"),
    )


def update_memory(config: AgentConfig, loaded: dict[str, Any]) -> int | None:
    """What one agent's update takes of the device; None if the compiler gives no account."""
    taken = programs.update_bytes(config, networks.actions_of(loaded["behaviour"]["params"]["actor"]), Together(1))
    return None if taken is None else taken[1]


def _parameters(loaded: dict[str, Any]) -> int:
    """Numbers under every "params"."""
    parts = [loaded[part]["params"] for part in ("world_model", "behaviour")]
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(parts))


def object_errors(directory: pathlib.Path, config: AgentConfig, env: JaxEnv) -> tuple[float, float]:
    """Mean squared error of a run's reconstructions, where something is and elsewhere.

    Something is on a pixel that differs from its median over the frames of random play: ball, paddle, bricks that are
    hit. The mean over all pixels says little about them, because they are few.

    Args:
      directory: of a finished run.
      config: of its agent.
      env: its environment.
    """
    capacity = max(_SHOWN, config.warmup_steps + 1)
    small = dataclasses.replace(config, replay=dataclasses.replace(config.replay, capacity=capacity))

    @jax.jit
    def reconstructed(loaded: Any) -> tuple[jax.Array, jax.Array]:
        loop, _ = in_graph.play_randomly(env, _SHOWN, in_graph.begin(small, env, jax.random.key(1)))
        frames = loop.agent.replay.frames[:_SHOWN]
        return frames, agent.reconstruct(weights.into(loop.agent, loaded), frames, jax.random.key(2))

    frames, shown = jax.device_get(reconstructed(checkpoint.load_weights(directory)))
    target = frames.astype(np.float32) / 255
    something = np.abs(target - np.median(target, axis=0)) > _DIFFERENT
    error = np.square(shown - target)
    if something.all() or not something.any():
        raise ConfigError("the frames of random play show no objects on a background; measure on another environment")
    return float(error[something].mean()), float(error[~something].mean())
