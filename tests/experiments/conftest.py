"""A run directory with a checkpoint, as a run leaves it, without a run."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from drama_jax.config import preset
from drama_jax.training import arrays, checkpoint, programs, replay_log, run_directory
from drama_jax.training.checkpoint_writer import Checkpoints

ACTIONS = 4  # of Breakout


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """A run directory as a run leaves it, of a very small agent."""
    config = preset("tiny")
    model = dataclasses.replace(
        config.agent.world_model,
        backbone=dataclasses.replace(config.agent.world_model.backbone, num_layers=1),
        batch_size=2,
        batch_length=6,
    )
    imagination = dataclasses.replace(config.agent.imagination, batch_size=4, context_length=2)
    small = dataclasses.replace(
        config.agent, world_model=model, imagination=imagination, acting_context=2, warmup_steps=20
    )
    config = dataclasses.replace(config, agent=small)
    directory = run_directory.create(tmp_path_factory.mktemp("runs"), "Breakout", "tiny", config)
    state = programs.initial_state(jax.random.key(0), config.agent, ACTIONS)
    device = arrays.to_host({"agent": dataclasses.replace(state, replay=replay_log.without_rows(state.replay))})
    checkpoints = Checkpoints(directory, "a run", capacity=1)
    checkpoints.save(checkpoint.Snapshot(7, 0, device, {}, {}))
    checkpoints.close()
    assert checkpoints.error is None
    return directory, config
