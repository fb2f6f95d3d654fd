"""Drama on an environment of EnvPool other than Atari: DeepMind control, Procgen, Gym's MuJoCo tasks and more.

    python -m experiments.envpool --task CheetahRun-v1 --preset tiny

What the agent sees and does follows from the task (`drama_jax.envs.envpool_tasks`). Everything else is as in
`experiments.atari100k`: one environment, one update a step, run directory, evaluation, continuing. Steps are agent
steps; how long one lasts is the task's own matter. Procgen needs Qt 5 on the machine (Debian: libqt5gui5).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from drama_jax.training.logging import say
from drama_jax.training.signals import stop_requested
from experiments import command_line, envpool_options, machine, runner
from experiments.exits import exit_code
from experiments.sweep import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit code, see `exits.exit_code`."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        options, config = envpool_options.parse(arguments)
        planned = plan(config, options.seeds)
        machine.set_xla_flags(deterministic=options.deterministic, agents=len(planned))
        jax.config.update("jax_debug_nans", options.debug_nans)
        with stop_requested() as stop:
            runs, finished = runner.run(options.game, options, planned, stop)
        if not finished:
            directory = runs[0].directory if len(planned) == 1 else options.logdir
            again = command_line.to_continue(arguments, envpool_options.PROGRAM, directory)
            say(f"stopped; to continue:\n{again}", sys.stdout)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
