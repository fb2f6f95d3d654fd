"""What a sequence model of the grid world's study costs: time and memory of an update, time and memory of a step.

Memory is what XLA sets aside for the compiled program: arguments, results and everything in between, known before it
runs. (A GPU's own count is of the whole process, never falls, and holds what XLA tried while it compiled.)
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import grid_world_model as model
from experiments.grid_world_model import StudyConfig, TokenModel

_UPDATES = 4
"""Updates of one timed call: what it costs to start a program is shared between them."""
_STEP_FRAMES = 2
"""Frames that are made token by token in one timed call."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one model costs at one length."""

    update_ms: float
    """Median time of an update of B sequences, compiled and warm."""
    update_mb: float
    """Memory of the program of an update, in 10^6 bytes."""
    compile_s: float
    """Seconds until that program was compiled, nothing being cached."""
    step_us: float
    """Median time of one token for all B sequences, microseconds, each fed back as the next input."""
    state_kb: float
    """What has to be remembered of one sequence between two tokens, in 10^3 bytes."""


def measure(config: StudyConfig, repeats: int) -> Costs:
    """Compiles and times updates and steps of a new model, `repeats` times each."""
    data_key, init_key = jax.random.split(jax.random.key(0))
    state = jax.jit(functools.partial(model.init, config))(init_key)
    # Any tokens cost as much.
    shape = _UPDATES, config.batch_size, config.num_tokens
    tokens = jax.random.randint(data_key, shape, 0, config.env.num_tokens, jnp.int32)
    update_ms, update_mb, compile_s = _updates(config, state, tokens, repeats)
    step_us, state_kb = _steps(config, state.params, repeats)
    return Costs(update_ms, update_mb, compile_s, step_us, state_kb)


def generate(config: StudyConfig, params: Any) -> tuple[jax.Array, Any]:
    """The most likely tokens [2 E, B] from nothing but a first covered cell, and what is remembered after them."""
    module = TokenModel(config)

    def body(carry: tuple[jax.Array, Any], place: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        token, memory = carry
        places = jnp.broadcast_to(place, token.shape)
        logits, memory = module.apply(params, token, places, memory, method="step")
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (token, memory), token

    memory = module.apply(params, config.batch_size, method="initial_state")
    places = jnp.arange(_STEP_FRAMES * config.places, dtype=jnp.int32) % config.places
    (_, memory), tokens = jax.lax.scan(body, (jnp.zeros(config.batch_size, jnp.int32), memory), places)
    return tokens, memory


def _updates(
    config: StudyConfig, state: model.TrainState, tokens: jax.Array, repeats: int
) -> tuple[float, float, float]:
    """Milliseconds and megabytes of an update, and seconds to compile."""
    program = jax.jit(functools.partial(model.updates, config), donate_argnums=0)
    before = time.perf_counter()
    compiled = program.lower(jax.tree.map(jnp.copy, state), tokens).compile()
    compile_s = time.perf_counter() - before
    current = [jax.tree.map(jnp.copy, state)]

    def call() -> Any:
        current[0], losses = compiled(current[0], tokens)
        return losses

    ms = median_ms(call, repeats) / _UPDATES
    return ms, memory_bytes(compiled.memory_analysis()) / 1e6, compile_s


def _steps(config: StudyConfig, params: Any, repeats: int) -> tuple[float, float]:
    """Microseconds of a token, and kilobytes of one sequence's memory."""
    program = jax.jit(functools.partial(generate, config))
    us = median_ms(lambda: program(params), repeats) * 1e3 / (_STEP_FRAMES * config.places)
    memory = jax.eval_shape(functools.partial(generate, config), params)[1]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
    return us, size / config.batch_size / 1e3


def memory_bytes(analysis: Any) -> int:
    """Bytes of a compiled program: arguments, results that are not written over them, and what lies in between."""
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(held + analysis.temp_size_in_bytes)


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of `repeats` calls that return arrays, after one that does not count."""
    times = []
    for _ in range(1 + repeats):
        before = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times[1:])
