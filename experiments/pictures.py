"""Pictures of what a finished run sees and dreams: reconstructions and an imagined rollout beside real frames.

    python -m experiments.pictures --logdir runs/Breakout/tiny/seed0-... --out docs

The newest checkpoint plays the run's game with its own policy for a few hundred steps; the frames shown come from
there, not from the replay it was trained on. Needs matplotlib (in the extra `drama_jax[test]`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drama_jax import agent
from drama_jax.config import ConfigError
from drama_jax.envs.base import Env
from drama_jax.replay import Batch
from drama_jax.training import config_file
from experiments import figures, saved
from experiments.command_line import parse_plain
from experiments.machine import make_environment

_DREAMT = 16
"""Imagined steps shown."""
_INCHES = 1.1
"""Width and height of one frame in a picture."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the run is, where the pictures go, and what they show."""

    logdir: pathlib.Path
    """A run directory with config.json and checkpoints."""
    weights: pathlib.Path | None = None
    """A file of weights (.npz) instead of the run's newest checkpoint."""
    out: pathlib.Path = pathlib.Path("docs")
    """Directory for reconstructions.png and imagination.png; made if it is not there."""
    steps: int = 300
    """Agent steps to play (1 step = 4 emulator frames); the pictures come from them."""
    frames: int = 8
    """Frames in reconstructions.png, spread evenly over the steps."""
    every: int = 1
    """imagination.png shows every so many steps."""
    seed: int = 1
    """Seed of actions and latents."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pictures; returns the exit code: 0, or 2 after a mistake of the user, which one line explains."""
    try:
        options = parse_plain(Options, arguments, "python -m experiments.pictures", __doc__)
        for path in draw(options):
            print(path)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(options: Options) -> list[pathlib.Path]:
    """Plays the run's game and writes the pictures; returns their paths.

    Raises:
      ConfigError: if the run cannot be read, matplotlib is missing, or the steps are too few.
    """
    figure = figures.import_figure()
    game, config = config_file.load_config(options.logdir)
    context = config.agent.imagination.context_length
    least = max(options.frames, context + _DREAMT)
    if options.frames < 1 or options.steps < least:
        raise ConfigError(f"--steps {options.steps} --frames {options.frames}: at least {least} steps and 1 frame")
    if not 1 <= options.every <= _DREAMT:
        raise ConfigError(f"--every {options.every}: must lie in [1, {_DREAMT}]")
    play_key, latent_key, dream_key = jax.random.split(jax.random.key(options.seed), 3)
    with contextlib.closing(make_environment(game, config, num_envs=1)) as environment:
        state = saved.load(options.logdir, config, environment.num_actions, file=options.weights)
        played = play(state, environment, options.steps, play_key)
    options.out.mkdir(parents=True, exist_ok=True)

    shown = np.linspace(0, options.steps - 1, options.frames).round().astype(int)
    real = np.asarray(played.frames[0, shown])
    reconstruction = jax.jit(agent.reconstruct)(state, jnp.asarray(real), latent_key)
    rows = {"real": real / 255, "reconstructed": np.asarray(reconstruction)}
    paths = [options.out / "reconstructions.png"]
    _save(figure, paths[0], rows, [f"step {step}" for step in shown])

    window = _window(played, context + _DREAMT)
    dream = jax.jit(agent.imagine_video, static_argnums=3)(state, window, dream_key, context)
    truth, dream = np.asarray(window.frames[0]) / 255, np.asarray(dream[0])
    rows = {"real": truth, "imagined": dream, "error": np.abs(truth - dream)}
    titles = ["context"] * context + [f"+{step}" for step in range(1, _DREAMT + 1)]
    # The last frame of the context is among them, and so are +every, +2 every ...
    columns = range((context - 1) % options.every, context + _DREAMT, options.every)
    rows = {name: frames[np.asarray(columns)] for name, frames in rows.items()}
    paths.append(options.out / "imagination.png")
    _save(figure, paths[1], rows, [titles[step] for step in columns], sum(step < context for step in columns))
    return paths


def play(state: Any, environment: Env, steps: int, key: jax.Array) -> Batch:
    """Plays `steps` agent steps with the sampled policy in one environment; a batch [1, steps, ...].

    Args:
      state: `AgentState`.
      environment: One environment (`num_envs` 1), freshly made.
      steps: Agent steps; resets are not counted.
      key: consumed.
    """
    act = jax.jit(agent.act)
    acting = agent.initial_acting(state, 1)
    observation = environment.reset()
    rows: list[tuple[Any, ...]] = []
    for step in range(steps):
        frames = jax.device_put(observation.frames, may_alias=False)
        actions, acting = act(state, acting, frames, jax.random.fold_in(key, step), observation.first)
        actions = np.asarray(actions)
        after = environment.step(actions)
        rows.append((np.array(frames[0]), actions[0], after.rewards[0], after.terminals[0], observation.first[0]))
        observation = environment.step(actions) if after.last[0] else after  # the second call resets
    return Batch(*(jnp.asarray(np.stack(column))[None] for column in zip(*rows, strict=True)))


def _window(played: Batch, length: int) -> Batch:
    """The latest window of `length` steps inside one episode; the latest of all if no episode lasts that long."""
    firsts = np.asarray(played.firsts[0])
    starts = range(len(firsts) - length, -1, -1)
    whole = (start for start in starts if not firsts[start + 1 : start + length].any())
    start = next(whole, len(firsts) - length)
    return jax.tree.map(lambda x: x[:, start : start + length], played)


def _save(
    figure: Any, path: pathlib.Path, rows: dict[str, np.ndarray], titles: Sequence[str], context: int | None = None
) -> None:
    """Rows of frames [T, H, W, C] in 0..1 with a title per column; red frames after the first `context` columns."""
    height, width = len(rows), len(titles)
    # No pyplot: a bare figure needs no display and leaves no global state.
    picture = figure(figsize=(_INCHES * width + 0.4, _INCHES * height + 0.3), layout="constrained")
    axes = picture.subplots(height, width, squeeze=False)
    for row, (name, frames) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for column, (axis, frame) in enumerate(zip(row, frames, strict=True)):
            axis.imshow(np.clip(np.broadcast_to(frame, (*frame.shape[:2], 3)), 0, 1), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            imagined = context is not None and column >= context
            for spine in axis.spines.values():
                spine.set(color="tab:red" if imagined else "black", linewidth=1.5)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    picture.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
