"""Long sequences: what five sequence models cost, and what they remember, in a grid world of tokens.

    python -m experiments.grid_world                       # half an hour on a CPU core
    python -m experiments.grid_world --only costs          # times once more, on a quiet machine
    python -m experiments.grid_world --frames-per-update 1024 --updates 3000 --cost-batch 32 --out gpu  # for a GPU

After the long-sequence study of the paper (arXiv 2410.08893): 25 cells and an action make 26 tokens a frame, 8 frames
208 tokens, 64 frames 1,664. Each of the next frame's tokens is predicted from all tokens before it. The frames are
those of `drama_jax.envs.grid_world`: one cell is seen, and whoever remembers when it was seen last knows its colour.

errors: `colour` is the colour under the agent, if only colours were to choose from: chance 75 %; 0 for a cell that was
shown before, however long ago, and 75 % for a new one are the best possible. `cell` is the same among all tokens, so
that it also takes to know where the agent is, `frame` is wrong if any of the 25 cells is.
costs: time, memory and compilation of an update of --cost-batch sequences, and of a single token in the step form.

OUT has grid_world.json, .md and .png. A part or row that is made again replaces the old one.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
import typing
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from drama_jax.config import BackboneName, ConfigError, preset
from drama_jax.training import run_directory
from experiments import figures, grid_world_costs, grid_world_report
from experiments import grid_world_model as model
from experiments.command_line import parse_plain
from experiments.grid_world_model import StudyConfig

_PROGRAM = "python -m experiments.grid_world"
_PRESETS = {64: "tiny", 512: "xs"}
"""Width -> preset whose backbones are of matched size."""
_CHUNKS = 10
"""Parts in which the updates are made, to see how it goes; the losses kept are their means."""
_MOST = 1_000_000


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, and how much is spent on it."""

    backbones: tuple[BackboneName, ...] = typing.get_args(BackboneName)
    """Sequence models."""
    frames: tuple[int, ...] = (8, 64)
    """Lengths of the sequences; 26 tokens a frame."""
    only: Literal["all", "errors", "costs", "report"] = "all"
    """A part to make anew; report: only tables and picture, from the file."""
    width: int = 64
    """Width of the models: 64 or 512, at which the backbones have as many parameters."""
    updates: int = 1_200
    """Updates of each model."""
    frames_per_update: int = 64
    """So that an update sees as many tokens whatever the length: one sequence of 64 frames, or eight of eight."""
    seeds: int = 2
    """Models of each kind, trained at once."""
    learning_rate: float = 4e-3
    test_batches: int = 128
    """Batches of fresh sequences that each model is tested on."""
    cost_batch: int = 4
    """Sequences of the updates that are timed, at every length."""
    repeats: int = 10
    """Timed calls; the median counts."""
    out: pathlib.Path = pathlib.Path("grid_world")
    """Directory for data, tables and picture."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit code: 0, or 2 after a mistake of the user."""
    try:
        options = parse_plain(Options, arguments, _PROGRAM, __doc__)
        check(options)
        print(run(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check(options: Options) -> None:
    """Raises a ConfigError if the study cannot be made."""
    for name in ("updates", "frames_per_update", "seeds", "test_batches", "cost_batch", "repeats"):
        value = getattr(options, name)
        if not 1 <= value <= _MOST:
            raise ConfigError(f"--{name.replace('_', '-')} must be from 1 to {_MOST}, got {value}")
    most = options.frames_per_update
    if not options.frames or not all(2 <= frames <= most for frames in options.frames):
        given = " ".join(map(str, options.frames)) or "none"
        raise ConfigError(f"--frames must be from 2 to --frames-per-update {most}, one or more, got {given}")
    if not options.backbones:
        raise ConfigError(f"--backbones: name one or more of {', '.join(typing.get_args(BackboneName))}")
    if options.width not in _PRESETS:
        raise ConfigError(f"--width must be one of {', '.join(map(str, _PRESETS))}, got {options.width}")
    if not options.learning_rate > 0:
        raise ConfigError(f"--learning-rate must be positive, got {options.learning_rate}")
    figures.import_figure()


def run(options: Options) -> str:
    """Makes the parts that are asked for, writes every row to the file, and the report; returns the tables.

    Raises:
      ConfigError: if the file is of other settings, or cannot be written.
    """
    path = options.out / f"{grid_world_report.NAME}.json"
    content = grid_world_report.read(path)
    todo = {part: settings(options, part) for part in ("errors", "costs") if options.only in ("all", part)}
    for part, common in todo.items():
        grid_world_report.check(content, part, common, path)
    for part, common in todo.items():
        for name in dict.fromkeys(options.backbones):
            for frames in dict.fromkeys(options.frames):
                row = {"backbone": name, "frames": frames, "tokens": study_config(options, name, frames, 1).num_tokens}
                made = errors if part == "errors" else costs
                row |= made(options, name, frames) | {"made": _made()}
                grid_world_report.add(options.out, part, common, row)
    return grid_world_report.report(grid_world_report.read(path), options.out)


def settings(options: Options, part: str) -> dict[str, Any]:
    """What all rows of a part have in common."""
    common = {"width": options.width, "compute_dtype": _dtype()}
    if part == "costs":
        return common | {"batch": options.cost_batch}
    names = ("updates", "frames_per_update", "seeds", "learning_rate")
    return common | {name: getattr(options, name) for name in names} | {"colours": model.GridWorld().colours}


def study_config(options: Options, name: BackboneName, frames: int, batch: int) -> StudyConfig:
    """The model called `name` for sequences of so many frames."""
    backbone = preset(_PRESETS[options.width], name).agent.world_model.backbone
    config = StudyConfig(backbone, frames, batch, compute_dtype=_dtype())
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(backbone, max_length=config.num_tokens),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=options.learning_rate),
    )


def errors(options: Options, name: BackboneName, frames: int) -> dict[str, Any]:
    """Trains the seeds of one model together and tests them: parameters, losses, and wrong predictions by gap."""
    config = study_config(options, name, frames, options.frames_per_update // frames)
    keys = jax.vmap(lambda key: jax.random.split(key, 2 + _CHUNKS))(
        jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(np.arange(options.seeds))
    )
    size = -(-options.updates // _CHUNKS)
    train = jax.jit(jax.vmap(functools.partial(model.train, config, size)), donate_argnums=0)
    state = jax.jit(jax.vmap(functools.partial(model.init, config)))(keys[:, 0])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) // options.seeds
    before, losses = time.perf_counter(), []
    for chunk in range(-(-options.updates // size)):
        state, values = train(state, keys[:, 2 + chunk])
        losses.append(np.asarray(values, np.float64).mean(axis=1))
        done, mean = (chunk + 1) * size, losses[-1].mean()
        print(
            f"{name}, {frames} frames: {done} updates, loss {mean:.4f}, {time.perf_counter() - before:.0f} s",
            flush=True,
        )
    test = jax.jit(jax.vmap(functools.partial(model.errors, config, options.test_batches)))
    counts = {kind: np.asarray(values) for kind, values in vars(test(state, keys[:, 1])).items()}
    found = {kind: grid_world_report.binned(values, frames) for kind, values in counts.items()}
    return {
        "parameters": parameters,
        "losses": np.stack(losses, axis=1).round(5).tolist(),
        "train_s": round(time.perf_counter() - before, 1),
        "frames_by_gap": found.pop("frames"),
        **found,
    }


def costs(options: Options, name: BackboneName, frames: int) -> dict[str, Any]:
    """Time and memory of one model."""
    config = study_config(options, name, frames, options.cost_batch)
    found = dataclasses.asdict(grid_world_costs.measure(config, options.repeats))
    print(f"{name}, {frames} frames: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True)
    return {key: round(value, 3) for key, value in found.items()}


def _dtype() -> str:
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def _made() -> dict[str, Any]:
    """Device, versions and commit."""
    found = run_directory.environment()
    return {"device": found["device"], "versions": found["versions"], "commit": found["commit"]}


if __name__ == "__main__":
    sys.exit(main())
