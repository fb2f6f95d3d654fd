"""Loss curves of the world model in bfloat16 and in float32, on the same real frames, draws and noise.

    python -m benchmarks.precision --updates 200 --backend ale
    python -m benchmarks.precision --picture benchmarks/results/precision-nvidia-h100-80gb-hbm3.json

The second line draws the curves of a result file beside it (needs matplotlib). `band` of a loss is the largest
distance between the two curves, each smoothed over `WINDOW` updates, as a share of the float32 curve. A second float32
run from another seed shows how far apart curves are that differ by chance only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from drama_jax import agent
from drama_jax.config import PRESETS, AtariConfig, preset
from drama_jax.envs import make_atari

WINDOW = 20
LOSSES = ("reconstruction_loss", "reward_loss", "termination_loss", "dynamics_kl", "total_loss")


def recorded(game: str, backend: Any, image_size: int, steps: int) -> tuple[int, dict[str, np.ndarray]]:
    """Number of actions, and `steps` steps of uniformly random play as columns of the replay."""
    environment = make_atari(game, AtariConfig(backend=backend), num_envs=1, image_size=image_size, seed=0)
    rng, observation, num_actions = np.random.default_rng(0), environment.reset(), environment.num_actions
    assert isinstance(num_actions, int)  # of Atari
    rows: list[tuple[Any, ...]] = []
    while len(rows) < steps:
        action = rng.integers(num_actions, size=1, dtype=np.int32)
        after = environment.step(action)
        rows.append((observation.frames[0], action[0], after.rewards[0], after.terminals[0], observation.first[0]))
        observation = environment.step(action) if after.last[0] else after
    environment.close()
    names = ("frames", "actions", "rewards", "terminals", "firsts")
    return num_actions, {name: np.stack(column) for name, column in zip(names, zip(*rows))}


def curves(config: Any, num_actions: int, columns: dict[str, np.ndarray], updates: int, seed: int) -> dict[str, Any]:
    """Each loss [updates] of world-model training on `columns`."""
    count = len(columns["actions"])
    config = dataclasses.replace(config, replay=dataclasses.replace(config.replay, capacity=count))
    state = jax.jit(agent.init, static_argnums=(1, 2))(jax.random.key(seed), config, num_actions)
    memory = dataclasses.replace(
        state.replay,
        **{name: jnp.asarray(column, getattr(state.replay, name).dtype) for name, column in columns.items()},
        size=jnp.asarray(count, jnp.int32),
    )
    state = dataclasses.replace(state, replay=memory)
    update = jax.jit(agent.train_world_model, donate_argnums=0)
    rows = []
    for _ in range(updates):
        state, metrics = update(state)
        rows.append({name: metrics[f"world_model/{name}"] for name in LOSSES})
    rows = jax.device_get(rows)
    return {name: [float(row[name]) for row in rows] for name in LOSSES}


def band(curve: list[float], reference: list[float]) -> float:
    """The largest distance of two smoothed curves, as a share of the second."""
    kernel = np.ones(WINDOW) / WINDOW
    smooth, expected = (np.convolve(values, kernel, mode="valid") for values in (curve, reference))
    return float((np.abs(smooth - expected) / np.maximum(np.abs(expected), 1e-8)).max())


def draw(path: pathlib.Path) -> pathlib.Path:
    """The curves of a result file as a picture beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    runs = {row["name"]: row["losses"] for row in result["rows"]}
    figure, axes = pyplot.subplots(1, len(LOSSES), figsize=(3.2 * len(LOSSES), 3), constrained_layout=True)
    for axis, loss in zip(axes, LOSSES):
        for name, style in (("float32, other seed", ":"), ("float32", "-"), ("bfloat16", "--")):
            axis.plot(runs[name][loss], style, label=name, linewidth=1)
        axis.set(title=loss, xlabel="update", yscale="log")
    axes[0].legend(fontsize=7)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=120)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="xs")
    parser.add_argument("--game", default="Breakout")
    parser.add_argument("--backend", choices=("envpool", "ale"), default="envpool")
    parser.add_argument("--steps", type=int, default=3_000, help="steps of recorded play")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--picture", type=pathlib.Path, default=None, help="draw this result file and end")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    if arguments.picture is not None:
        print(draw(arguments.picture))
        return
    config = preset(arguments.preset).agent
    image_size = config.world_model.autoencoder.image_size
    num_actions, columns = recorded(arguments.game, arguments.backend, image_size, arguments.steps)
    rows: list[dict[str, Any]] = []
    runs: list[tuple[str, Any, int]] = [
        ("float32", "float32", 0),
        ("bfloat16", "bfloat16", 0),
        ("float32, other seed", "float32", 1),
    ]
    for name, dtype, seed in runs:
        losses = curves(config.with_compute_dtype(dtype), num_actions, columns, arguments.updates, seed)
        reference = rows[0]["losses"] if rows else losses
        bands = {loss: band(losses[loss], reference[loss]) for loss in LOSSES}
        rows.append({"name": name, "preset": arguments.preset, "game": arguments.game, "band": bands, "losses": losses})
        print(name, bands, flush=True)
    common.write_result("precision", rows, arguments.out, show=False)


if __name__ == "__main__":
    main()
