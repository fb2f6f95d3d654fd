"""Ablations of the paper's choices: one command each, several seeds, intervals, a table and a picture.

    python -m experiments.ablate --what sampler --seeds 5 --out ablations/sampler
    python -m experiments.ablate --what backbone --envs Breakout-MinAtar --preset small --seeds 5
    python -m experiments.ablate --what sampler --game Breakout --seeds 3        # Atari, on a GPU

| --what | variants |
| --- | --- |
| sampler | DFS, DFS with four times the temperatures, uniform sampling |
| backbone | mamba2, mamba, gru, transformer, rwkv, of equal size (widths 64 and 512; else of equal width); memory |
| sequence-length | training sequences of 8, 32 and 128 steps; as many steps a batch as the preset has, at least 128 |
| autoencoder | half the channels, the preset's, twice as many; with the error on small objects |

Without --game every variant is a run of `experiments.jax_env` on each of --envs; with it, of `experiments.atari100k`.
All runs lie under OUT/runs/VARIANT and continue if the command is repeated; what is the preset as it is lies under
OUT/runs/preset, one run for all ablations. OUT/WHAT.json, .md and .png are written when all are finished; --redraw
makes the last two anew from the first. An interval is a percentile bootstrap over the seeds (95 %).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from drama_jax.config import AgentConfig, BackboneName, ConfigError, WorldModelConfig, backbone_sizes
from drama_jax.training.logging import say
from drama_jax.training.signals import stop_requested
from experiments import ablation_report, ablation_runs, figures
from experiments.ablation_runs import Plan, Result
from experiments.command_line import parse_plain

What = Literal["sampler", "backbone", "sequence-length", "autoencoder"]
SAMPLER_TASKS = (
    "Catch-bsuite",
    "drama_jax.envs.catch_tasks:SparseCatch",
    "drama_jax.envs.catch_tasks:SwitchingCatch",
)
"""A dense reward, a sparse one, and one that changes sign."""
LENGTHS = (8, 32, 128)
BACKBONES: tuple[BackboneName, ...] = ("mamba2", "mamba", "gru", "transformer", "rwkv")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, where, and how often."""

    what: What
    """The part that is varied."""
    envs: tuple[str, ...] = ()
    """JAX environments, as of experiments.jax_env; none given: Catch, and for the sampler also a sparse and a switching
    Catch."""
    game: str | None = None
    """An Atari game instead."""
    preset: str | None = None
    """Of experiments.jax_env (tiny if none is given), or with --game of experiments.atari100k (xs)."""
    seeds: int = 3
    steps: int | None = None
    """Agent steps of each run; the preset's if not given."""
    out: pathlib.Path = pathlib.Path("ablations")
    """Directory for runs, table, data and picture."""
    flags: str = ""
    """More flags for every run, in one string: --flags="--agent.warmup-steps 100"."""
    redraw: bool = False
    """Only make tables and picture anew from OUT/WHAT.json, with nothing run; no other flag is looked at."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the ablation; returns the exit code: 0 finished or stopped and saved, 1 a run failed, 2 a user's mistake."""
    try:
        options = parse_plain(Options, arguments, "python -m experiments.ablate", __doc__)
        figures.import_figure()
        base = options.out / options.what
        if not options.redraw:
            with stop_requested() as stop:
                results = run(options, stop)
            if results is None:
                say("stopped; the same command continues", sys.stdout)
                return 0
            ablation_report.write(base, results)
        print(ablation_report.show(base, ablation_report.read(base)))
    except (ConfigError, ablation_runs.Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def run(options: Options, stop: Callable[[], bool] = lambda: False) -> list[Result] | None:
    """All runs of all variants, one after the other; None if `stop` has ended it.

    Raises:
      ConfigError: if a flag is wrong; the first run says so before anything is begun.
      ablation_runs.Failed: if a run failed.
    """
    if options.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {options.seeds}")
    if options.game is not None and options.envs:
        raise ConfigError("--game and --envs exclude each other; give one of them")
    plans = [plan for name in names(options) for plan in plans_of(options, name)]
    for plan in plans:
        ablation_runs.check(plan)
    results = []
    for plan in plans:
        result = ablation_runs.run(plan, stop)
        if result is None:
            return None
        results.append(result)
    return results


def names(options: Options) -> tuple[str, ...]:
    """The environments or the game."""
    if options.game is not None:
        return (options.game,)
    return options.envs or (SAMPLER_TASKS if options.what == "sampler" else SAMPLER_TASKS[:1])


def plans_of(options: Options, name: str) -> list[Plan]:
    """A plan for each variant on one environment or game."""
    preset = options.preset or ("tiny" if options.game is None else "xs")
    agent = ablation_runs.agent_of(name, preset, atari=options.game is not None)
    steps = [] if options.steps is None else ["--steps", str(options.steps)]
    return [
        Plan(
            name=name,
            variant=variant,
            atari=options.game is not None,
            objects=options.what == "autoencoder" and options.game is None,
            memory=options.what == "backbone",
            arguments=(
                *("--game" if options.game else "--env", name, "--preset", preset, "--seeds", str(options.seeds)),
                *("--logdir", str(options.out / "runs" / (variant.replace(" ", "-") if flags else "preset"))),
                *steps,
                *flags,
                *options.flags.split(),
            ),
        )
        for variant, flags in variants(options.what, agent, atari=options.game is not None).items()
    ]


def variants(what: What, agent: AgentConfig, *, atari: bool) -> dict[str, list[str]]:
    """Name of each variant -> its flags, for an agent configuration."""
    model, replay = agent.world_model, agent.replay
    if what == "sampler":
        hot = {"tau": 4 * replay.tau, "imagination-tau": 4 * replay.imagination_tau}
        hot_flags = [word for name, value in hot.items() for word in (f"--agent.replay.{name}", str(value))]
        return {"DFS": [], "DFS, 4 tau": hot_flags, "uniform": ["--agent.replay.sampler", "uniform"]}
    if what == "backbone":
        if atari:
            return {name: ["--backbone", name] for name in BACKBONES}
        return {name: [] if name == model.backbone.name else _backbone_flags(name, model) for name in BACKBONES}
    prefix = "--agent.world-model"
    if what == "sequence-length":
        total = max(model.batch_size * model.batch_length, max(LENGTHS))
        sizes = {length: total // length for length in LENGTHS}
        return {
            f"{length} steps": [f"{prefix}.batch-length", str(length), f"{prefix}.batch-size", str(size)]
            for length, size in sizes.items()
        }
    depths = model.autoencoder.depths
    return {
        name: [f"{prefix}.autoencoder.depths", *(str(max(1, int(factor * depth))) for depth in depths)] * (factor != 1)
        for name, factor in (("half the channels", 0.5), ("channels of the preset", 1), ("twice the channels", 2))
    }


def _backbone_flags(name: BackboneName, model: WorldModelConfig) -> list[str]:
    fields = {"name": name, **backbone_sizes(name, model.backbone.width)}
    flags = [(f"--agent.world-model.backbone.{field.replace('_', '-')}", str(value)) for field, value in fields.items()]
    return [word for flag in flags for word in flag]


if __name__ == "__main__":
    sys.exit(main())
