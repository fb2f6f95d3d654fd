"""The end of a run: its evaluation, and scores.json."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import jax

from drama_jax.envs.base import EmulatorError
from drama_jax.training import evaluation, run_directory, scores
from drama_jax.training.logging import Progress, Writer, say
from drama_jax.training.member import Training
from experiments import machine
from experiments.exits import Failed
from experiments.machine import Played
from experiments.runs import Run


def evaluate(this: Run[Played], training: Training, key: jax.Array, stop: Callable[[], bool]) -> list[float] | None:
    """Plays the evaluation episodes and logs their mean; None if `stop` has ended it.

    Raises:
      Failed: if the emulator failed.
    """
    config, episodes = this.config, this.config.evaluation.episodes
    if episodes == 0:
        return []
    num_envs = min(config.evaluation.num_envs, episodes)
    with (
        contextlib.closing(Progress(episodes, config.logging.progress, "evaluation", unit="episode")) as progress,
        Writer(this.directory, config.logging, say=progress.say) as writer,
        contextlib.closing(
            machine.make_environment(this.game, config, num_envs=num_envs, evaluation=True)
        ) as environment,
    ):
        try:
            returns = evaluation.evaluate(
                training.state, environment, episodes, key, on_episode=lambda _: progress.advance(), stop=stop
            )
        except EmulatorError as error:
            raise Failed(f"the emulator failed in the evaluation: {error}. The same command repeats it") from error
        if returns is None:
            return None
        result = scores.summary(this.game, returns)
        values = {"eval/episodic_return": result["mean"], "eval/human_normalised_score": result["human_normalised"]}
        known = {tag: value for tag, value in values.items() if value is not None}
        writer.scalars(config.steps, training.wall_clock_s, known)
    return returns


def report(this: Run[Played], training: Training, returns: list[float], seconds: float) -> None:
    """Writes scores.json and prints the table."""
    result = scores.summary(this.game, returns) | {
        "game": this.game,
        "preset": this.preset,
        "seed": this.config.seed,
        "steps": this.config.steps,
        "training_returns": training.returns,
        "wall_clock_s": seconds,
        "training_s": training.wall_clock_s,
        "ms_per_step": training.ms_per_step,
        **run_directory.environment(),
    }
    try:
        scores.write(this.directory / "scores.json", result)
    except OSError as error:
        raise Failed(f"{this.directory / 'scores.json'}: {error.strerror}; the same command repeats it") from error
    say(scores.format_table(this.game, returns), sys.stdout)
