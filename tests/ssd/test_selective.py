"""The selective scan of Mamba-1: golden block, the token scan as oracle, resets, splits, gradients, error messages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama_jax.ssd import selective_scan, selective_step

BATCH, TIME, CHANNELS, STATE = 2, 13, 5, 3


def numbers(seed, dtype=np.float64, time=TIME, decay=1.0):
    rng = np.random.default_rng(seed)
    values = {
        "x": rng.normal(size=(BATCH, time, CHANNELS)),
        "dt": rng.uniform(0.01, decay, (BATCH, time, CHANNELS)),
        "A": -rng.uniform(0.5, 2, (CHANNELS, STATE)),
        "B": rng.normal(size=(BATCH, time, STATE)),
        "C": rng.normal(size=(BATCH, time, STATE)),
        "D": rng.normal(size=CHANNELS),
        "initial_state": rng.normal(size=(BATCH, CHANNELS, STATE)),
    }
    return {name: jnp.asarray(value.astype(dtype)) for name, value in values.items()}


def ids(*resets, time=TIME):
    starts = np.zeros((BATCH, time), np.int32)
    for row, steps in enumerate(resets):
        starts[row, list(steps)] = 1
    return jnp.asarray(np.cumsum(starts, 1, dtype=np.int32))


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def results(inputs, segments, implementation, chunk_size=4):
    def loss(inputs):
        y, final = selective_scan(**inputs, segment_ids=segments, implementation=implementation, chunk_size=chunk_size)
        return jnp.sum(jnp.sin(y.astype(final.dtype))) + jnp.sum(jnp.square(final)), (y, final)

    gradients, (y, final) = jax.grad(loss, has_aux=True)(inputs)
    return gradients | {"y": y, "final": final}


RUN = jax.jit(lambda inputs, segments: selective_scan(**inputs, segment_ids=segments, chunk_size=4))


def close(actual, expected, relative):
    for name, value in expected.items():
        scale = max(np.abs(np.asarray(value)).max(), 1e-30)
        actual_ = np.asarray(actual[name].astype(value.dtype))
        np.testing.assert_allclose(actual_, value, rtol=0, atol=relative * scale, err_msg=name)


def by_steps(inputs, resets):
    """Independent of the segment code: one step after the other, the state zeroed by hand."""
    state, ys = inputs["initial_state"], []
    for t in range(inputs["x"].shape[1]):
        drop = jnp.asarray([t in steps for steps in resets])
        state = jnp.where(drop[:, None, None], 0, state)
        now = [inputs["x"][:, t], inputs["dt"][:, t], inputs["A"], inputs["B"][:, t], inputs["C"][:, t]]
        y, state = selective_step(state, *now, D=inputs["D"])
        ys.append(y)
    return {"y": jnp.stack(ys, 1), "final": state}


RESETS = [((), ()), ((0,), (6,)), ((4, 8), (3, 12)), (tuple(range(TIME)), (5, 6))]


@pytest.mark.parametrize("resets", RESETS, ids=str)
def test_both_forms_equal_single_steps_with_resets(resets, x64):
    inputs = numbers(0)
    expected = results(inputs, ids(*resets), "reference")
    with jax.disable_jit():
        close(expected, by_steps(inputs, resets), 1e-13)
    close(results(inputs, ids(*resets), None), expected, 1e-12)


@pytest.mark.parametrize("decay", [2e-6, 10.0])
def test_float32_over_small_and_large_decays(decay, x64):
    inputs = numbers(2, time=200, decay=max(decay, 0.011))
    inputs["dt"] = jnp.minimum(inputs["dt"], decay)
    segments = ids((60,), (), time=200)
    narrow = {name: value.astype(jnp.float32) for name, value in inputs.items()}
    exact = {name: value.astype(jnp.float64) for name, value in narrow.items()}
    actual = results(narrow, segments, "chunked", 32)
    assert actual["y"].dtype == actual["final"].dtype == jnp.float32
    close(actual, {name: np.asarray(value) for name, value in results(exact, segments, "reference").items()}, 1e-5)


def test_bfloat16_inputs_keep_a_float32_state():
    inputs = numbers(3, np.float32)
    low = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    rounded = low | {name: low[name].astype(jnp.float32) for name in ("x", "B", "C")}
    (y, final), (expected_y, expected_final) = RUN(low, None), RUN(rounded, None)
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    np.testing.assert_allclose(final, expected_final, rtol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), expected_y, rtol=1e-2, atol=1e-2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(split=st.sampled_from([1, 4, 9]), rate=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 10**6))
def test_a_split_sequence_equals_the_whole(split, rate, seed):
    segments = np.cumsum(np.random.default_rng(seed).random((BATCH, TIME)) < rate, 1, dtype=np.int32)
    with jax.enable_x64(True):
        inputs = numbers(seed)
        y, final = RUN(inputs, jnp.asarray(segments))
        over_time = ("x", "dt", "B", "C")
        head = inputs | {name: inputs[name][:, :split] for name in over_time}
        tail = inputs | {name: inputs[name][:, split:] for name in over_time}
        y1, state = RUN(head, jnp.asarray(segments[:, :split]))
        tail["initial_state"] = state
        y2, last = RUN(tail, jnp.asarray(segments[:, split:] - segments[:, split - 1 : split]))
        np.testing.assert_allclose(jnp.concatenate([y1, y2], 1), y, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(last, final, rtol=1e-11, atol=1e-12)


def test_gradients_equal_finite_differences(x64):
    inputs, segments = numbers(4), ids((4,), (0, 7))
    rng = np.random.default_rng(0)
    direction = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in inputs.items()}

    def loss(inputs):
        y, final = selective_scan(**inputs, segment_ids=segments, chunk_size=4)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.square(final))

    step = 1e-6
    there, back = ({k: v + sign * step * direction[k] for k, v in inputs.items()} for sign in (1, -1))
    slope = sum(float(jnp.vdot(g, direction[k])) for k, g in jax.jit(jax.grad(loss))(inputs).items())
    value = jax.jit(loss)
    np.testing.assert_allclose((value(there) - value(back)) / (2 * step), slope, rtol=1e-7)


def test_rows_are_independent_and_vmap_equals_a_loop(x64):
    seeds = [numbers(seed) for seed in range(3)]
    segments = ids((4,), ())
    batched = jax.jit(jax.vmap(lambda inputs: selective_scan(**inputs, segment_ids=segments, chunk_size=4)))
    stacked = batched(jax.tree.map(lambda *v: jnp.stack(v), *seeds))
    for n, inputs in enumerate(seeds):
        for a, e in zip(stacked, RUN(inputs, segments), strict=True):
            np.testing.assert_allclose(a[n], e, rtol=1e-13, atol=1e-14)
    other = seeds[0] | {"x": seeds[0]["x"].at[1].add(1.0)}
    before, after = RUN(seeds[0], segments)[0], RUN(other, segments)[0]
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1


# --- the block of the released code ------------------------------------------------------------------------------


def convolved(p, u):
    """x after the causal convolution and SiLU [B, T, E], and the gate z."""
    x, z = jnp.split(u @ p["in_proj.weight"].T, 2, axis=-1)
    padded = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    kernel = p["conv1d.weight"][:, 0]
    mixed = sum(padded[:, tap : tap + u.shape[1]] * kernel[:, tap] for tap in range(4))
    return jax.nn.silu(mixed + p["conv1d.bias"]), z


def operands(p, x):
    rank, state_dim = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    low, B, C = jnp.split(x @ p["x_proj.weight"].T, [rank, rank + state_dim], axis=-1)
    dt = jax.nn.softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    return x, dt, -jnp.exp(p["A_log"]), B, C


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_the_golden_block(implementation, golden, x64):
    data = golden("mamba1_block")
    p = {k.removeprefix("param/"): jnp.asarray(v, jnp.float64) for k, v in data.items() if k.startswith("param/")}
    u, w = jnp.asarray(data["u"], jnp.float64), jnp.asarray(data["w"], jnp.float64)
    run = functools.partial(selective_scan, implementation=implementation, chunk_size=8)

    def loss(p, u):
        x, z = convolved(p, u)
        y, final = run(*operands(p, x), D=p["D"])
        out = (y * jax.nn.silu(z)) @ p["out_proj.weight"].T
        return jnp.sum(out * w), (out, final)

    (by_p, by_u), (out, final) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(p, u)
    np.testing.assert_allclose(out, data["out"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(final, data["final_ssm_state"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_u, data["grad_u"], rtol=1e-9, atol=1e-12)
    for name, value in by_p.items():
        np.testing.assert_allclose(value, data[f"grad/{name}"], rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("prefill", [2, 8])
def test_the_golden_block_continues_from_its_state(prefill, golden, x64):
    data = golden("mamba1_block")
    p = {k.removeprefix("param/"): jnp.asarray(v, jnp.float64) for k, v in data.items() if k.startswith("param/")}
    x, z = jax.jit(convolved)(p, jnp.asarray(data["u"], jnp.float64))
    xs, dt, A, B, C = jax.jit(operands)(p, x)
    along = [v[:, :prefill] for v in (xs, dt)] + [A] + [v[:, :prefill] for v in (B, C)]
    y, state = selective_scan(*along, D=p["D"])
    np.testing.assert_allclose(state, data[f"prefill{prefill}_ssm_state"], rtol=1e-9, atol=1e-12)
    step, ys = jax.jit(selective_step), [y]
    for t in range(prefill, x.shape[1]):
        y, state = step(state, xs[:, t], dt[:, t], A, B[:, t], C[:, t], D=p["D"])
        ys.append(y[:, None])
    out = (jnp.concatenate(ys, 1) * jax.nn.silu(z)) @ p["out_proj.weight"].T
    np.testing.assert_allclose(out, data[f"prefill{prefill}_then_steps_out"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state, data["final_ssm_state"], rtol=1e-9, atol=1e-12)
