"""Trained agents from disk, for the commands that only look at them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from drama_jax.action_space import ActionSpace
from drama_jax.config import AnyRunConfig, ConfigError
from drama_jax.training import checkpoint, programs, weights


def load(
    logdir: pathlib.Path,
    config: AnyRunConfig,
    num_actions: ActionSpace,
    *,
    file: pathlib.Path | None = None,
    step: int | None = None,
) -> Any:
    """An `AgentState` with a run's weights and the smallest replay that its configuration allows.

    Args:
      logdir: The run directory.
      config: Its configuration.
      num_actions: Actions of its game.
      file: Weights to take instead of a checkpoint's, as from `weights.write`.
      step: Which checkpoint; the newest if None.

    Raises:
      ConfigError: if there is no such checkpoint or file, or it is damaged or of another configuration.
    """
    if file is not None and step is not None:
        raise ConfigError(f"--weights {file} --step {step}: a file of weights has no steps; name one of the two")
    if file is not None and file.suffix != weights.SUFFIX:
        raise ConfigError(f"--weights {file}: a file of weights is named *{weights.SUFFIX}")
    least = config.agent.warmup_steps + 1
    small = dataclasses.replace(config.agent, replay=dataclasses.replace(config.agent.replay, capacity=least))
    state = programs.initial_state(jax.random.key(0), small, num_actions)
    return weights.into(state, checkpoint.load_weights(logdir if file is None else file, step))
