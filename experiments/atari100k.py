"""One Atari game from one command: train Drama on it, evaluate it, print the score.

    python -m experiments.atari100k --game Breakout --preset tiny

Steps are agent steps; one step is four emulator frames, so the default of 100,000 steps is 400,000 frames. With
`--seeds` or `--sweep` several agents are trained in one process, each with the files of a run of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import jax

from drama_jax.config import ConfigError, RunConfig
from drama_jax.envs.games import canonical_game
from drama_jax.training.logging import say
from drama_jax.training.signals import stop_requested
from experiments import atari_options, command_line, machine, meeting, runner
from experiments.exits import exit_code
from experiments.machine import Played
from experiments.processes import ALONE, Distributed
from experiments.runs import Run
from experiments.sweep import Planned, plan

_PROGRAM = "python -m experiments.atari100k"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code, see `exits.exit_code`."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        options, config = atari_options.parse(arguments, _PROGRAM)
        whole = plan(config, options.seeds, options.sweep)
        distributed, planned = meeting.share(options.distributed, (options.game, options.preset), whole)
        machine.set_xla_flags(deterministic=options.deterministic, agents=len(planned))
        jax.config.update("jax_debug_nans", options.debug_nans)
        with stop_requested() as stop:
            runs, finished = run(options, planned, stop, distributed)
        if not finished:
            directory = runs[0].directory if len(whole) == 1 else options.logdir
            say(f"stopped; to continue:\n{command_line.to_continue(arguments, _PROGRAM, directory)}", sys.stdout)

    return exit_code(command)


def run(
    options: atari_options.AllOptions,
    planned: Sequence[Planned[RunConfig]],
    stop: Callable[[], bool] = lambda: False,
    distributed: Distributed = ALONE,
) -> tuple[list[Run[Played]], bool]:
    """`runner.run` on the options' game.

    Raises:
      ConfigError, exits.Failed: likewise, or there is no such game.
    """
    try:
        game = canonical_game(options.game)
    except ConfigError as error:
        raise ConfigError(f"--game: {error}") from None
    return runner.run(game, options, planned, stop, distributed)


if __name__ == "__main__":
    sys.exit(main())
