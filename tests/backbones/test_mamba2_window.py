"""The window of a short rollout: equal to the recurrence, in and out of a loop, with resets, in every precision."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import backbones
from drama_jax.config import BackboneConfig
from drama_jax.precision import at_least_float32

TINY = BackboneConfig(width=16, head_dim=8, state_dim=4, chunk_size=4)
HORIZON = 4


def make(dtype):
    return backbones.make(TINY, 3, dtype)


@functools.partial(jax.jit, static_argnames=("dtype", "scale"))
def init(key, *, dtype, scale):
    """Larger weights than initial ones: every path must matter, and heads must forget at different rates."""
    variables = make(dtype).init(key, jnp.zeros((1, 2, 6), dtype), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda leaf: leaf * scale + 0.1, variables)


@functools.partial(jax.jit, static_argnames=("dtype", "context", "kind", "unroll"))
def rollout(variables, latent, action, segment_ids, *, dtype, context, kind, unroll=1):
    """Features of a context in parallel form, then of the rest step by step in one scan, and the final memory."""
    module = make(dtype)
    past = (latent[:, :context], action[:, :context])
    ids = None if segment_ids is None else segment_ids[:, :context]
    if kind == "state":
        before, memory = module.apply(variables, *past, segment_ids=ids)
    else:
        steps = {"horizon": latent.shape[1] - context, "unrolled": kind == "rows"}
        before, memory = module.apply(variables, *past, segment_ids=ids, method="open_window", **steps)

    def body(memory, inputs):
        feature, memory = module.apply(variables, *inputs, memory, method="step")
        return memory, feature

    rest = (jnp.moveaxis(latent[:, context:], 1, 0), action[:, context:].T)
    memory, after = jax.lax.scan(body, memory, rest, unroll=unroll)
    return jnp.concatenate([before, jnp.moveaxis(after, 0, 1)], axis=1), memory


def inputs(context, dtype, scale=2.0):
    rng = np.random.default_rng(context)
    latent = jnp.asarray(rng.normal(size=(3, context + HORIZON, 6)), dtype)
    action = jnp.asarray(rng.integers(0, 3, latent.shape[:2]), jnp.int32)
    return init(jax.random.key(0), dtype=at_least_float32(dtype), scale=scale), latent, action


def resets(context):
    """One row without, one with an episode's start at the newest step, one with several, the first step included."""
    first = np.zeros((3, context), np.int32)
    first[1, -1] = 1
    first[2, [0, context // 2]] = 1
    return jnp.cumsum(jnp.asarray(first), axis=1)


@pytest.mark.parametrize(
    ("context", "kind", "reset"),
    [(1, "array", True), (1, "rows", False), (3, "rows", True), (8, "array", True), (8, "rows", True)],
)
def test_equals_the_recurrence(x64, context, kind, reset):
    variables, latent, action = inputs(context, jnp.float64)
    ids = resets(context) if reset else None
    run = functools.partial(rollout, variables, latent, action, ids, dtype=jnp.float64, context=context)
    expected, state = run(kind="state")
    actual, window = run(kind=kind, unroll=HORIZON if kind == "rows" else 1)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
    for layer, reference in zip(window.layers, state.layers, strict=True):
        np.testing.assert_allclose(jnp.stack(layer.conv, 1), reference.conv, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(implied_state(layer), reference.ssm, rtol=1e-9, atol=1e-12)


def implied_state(layer):
    """The SSM state [B, H, P, N] that a window stands for."""
    rollout = layer.rollout if isinstance(layer.rollout, jax.Array) else jnp.stack(layer.rollout, 1)
    x = jnp.concatenate([layer.context, rollout], axis=1)
    x = x.reshape(*x.shape[:2], layer.weights.shape[-1], -1)
    return jnp.einsum("bsh,bshp,bsn->bhpn", layer.weights, x, layer.B)


@pytest.mark.parametrize(("kind", "unroll"), [("array", 3), ("rows", 1)])
def test_any_loop_serves_either_layout(x64, kind, unroll):
    variables, latent, action = inputs(3, jnp.float64)
    run = functools.partial(rollout, variables, latent, action, resets(3), dtype=jnp.float64, context=3)
    expected, _ = run(kind="state")
    actual, _ = run(kind=kind, unroll=unroll)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_vmap_over_seeds_equals_each_alone(x64):
    variables, latent, action = inputs(3, jnp.float64)
    both = [variables, jax.tree.map(lambda leaf: leaf * 0.9, variables)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)

    def run(variables, kind):
        whole = rollout.__wrapped__  # compiler options are for the outermost jit alone
        return whole(variables, latent, action, resets(3), dtype=jnp.float64, context=3, kind=kind)[0]

    batched = jax.jit(jax.vmap(functools.partial(run, kind="array")))(stacked)
    for n, each in enumerate(both):
        np.testing.assert_allclose(batched[n], run(each, "state"), rtol=1e-9, atol=1e-12)


def test_float32(x64):
    """Against float64: the window is as accurate as the recurrence."""
    variables, latent, action = inputs(8, jnp.float32)
    run = functools.partial(rollout, segment_ids=resets(8), context=8)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    exact, _ = run(wide, latent.astype(jnp.float64), action, dtype=jnp.float64, kind="state")
    actual, window = run(variables, latent, action, dtype=jnp.float32, kind="array")
    assert actual.dtype == jnp.float32 and window.layers[0].weights.dtype == jnp.float32
    np.testing.assert_allclose(actual, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_bfloat16_keeps_weights_in_float32_and_inputs_in_bfloat16():
    variables, latent, action = inputs(3, jnp.bfloat16, scale=1.0)
    run = functools.partial(rollout, variables, latent, action, resets(3), dtype=jnp.bfloat16, context=3)
    expected, _ = run(kind="state")
    actual, window = run(kind="rows", unroll=HORIZON)
    layer = window.layers[1]
    assert layer.weights.dtype == actual.dtype == jnp.float32
    assert {row.dtype for row in (layer.context, *layer.rollout, *layer.conv, layer.B)} == {np.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-2 * np.abs(expected).max())


def test_fast_decay_forgets_without_nan():
    """Decays far below the smallest float32: the weight is zero, as in the recurrence."""
    variables, latent, action = inputs(3, jnp.float32)
    for layer in ("layers_0", "layers_1"):
        variables["params"][layer]["mixer"]["A_log"] = jnp.full((4,), 8.0)
    run = functools.partial(rollout, variables, latent, action, None, dtype=jnp.float32, context=3)
    np.testing.assert_allclose(run(kind="array")[0], run(kind="state")[0], rtol=1e-4, atol=1e-5)


def test_unrolled_rows_leave_no_selection_and_no_update():
    """What makes the layout fast: with constant positions the compiler reads what exists and writes one row."""
    variables, latent, action = inputs(3, jnp.float32)
    compiled = rollout.lower(
        variables, latent, action, None, dtype=jnp.float32, context=3, kind="rows", unroll=HORIZON
    ).compile()
    text = compiled.as_text()
    assert "while(" not in text and "dynamic-update-slice(" not in text
    # Nothing of the size of a row of x, [B, I] or [B, H, P], is selected.
    assert not any(" select(" in line and ("f32[3,32]" in line or "f32[3,4,8]" in line) for line in text.splitlines())


def test_a_step_beyond_the_horizon_is_nan():
    variables, latent, action = inputs(3, jnp.float32)
    module = make(jnp.float32)
    past = (latent[:, :3], action[:, :3])
    _, window = jax.jit(functools.partial(module.apply, method="open_window", horizon=2))(variables, *past)
    step = jax.jit(functools.partial(module.apply, method="step"))
    finite = []
    for t in range(3, 6):
        feature, window = step(variables, latent[:, t], action[:, t], window)
        finite.append(bool(jnp.isfinite(feature).all()))
    assert finite == [True, True, False]


def test_the_horizon_must_be_positive():
    variables, latent, action = inputs(1, jnp.float32)
    with pytest.raises(ValueError, match="horizon must be an integer from 1 .* got 0"):
        make(jnp.float32).apply(variables, latent, action, method="open_window", horizon=0)
