"""The SSD scan: golden vectors, oracle parity, resets, splits, gradients, error messages."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama_jax.ssd import segment_index, ssd, ssd_step

GOLDEN = (
    "ssd_L1",
    "ssd_L7",
    "ssd_L64_g2",
    "ssd_L64_xs",
    "ssd_L64_init_seg",
    "ssd_L128_seg",
    "ssd_L513",
    "ssd_L200_n128_g2_init",
)
INPUTS = ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "init")


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def _outputs_and_gradients(inputs, segment_ids, w, w2, implementation, chunk_size):
    """y, final state and the gradients of sum(y * w) + sum(final * w2), as the golden files define them."""

    def loss(inputs):
        delta = jax.nn.softplus(inputs["dt"] + inputs["dt_bias"])
        y, final = ssd(
            inputs["x"],
            delta,
            -jnp.exp(inputs["A_log"]),
            inputs["B"],
            inputs["C"],
            D=inputs["D"],
            initial_state=inputs.get("init"),
            segment_ids=segment_ids,
            implementation=implementation,
            chunk_size=chunk_size,
            interpret=implementation == "pallas",
        )
        return jnp.sum(y * w) + jnp.sum(final * w2), (y, final)

    gradients, (y, final) = jax.grad(loss, has_aux=True)(inputs)
    return {"y": y, "final": final} | {f"grad_{name}": value for name, value in gradients.items()}


def _run_golden(data, dtype, implementation, chunk_size):
    inputs = {name: jnp.asarray(data[name], dtype) for name in INPUTS if name in data}
    segment_ids = jnp.asarray(data["seq_idx"]) if "seq_idx" in data else None
    w, w2 = jnp.asarray(data["w"], dtype), jnp.asarray(data["w2"], dtype)
    return _outputs_and_gradients(inputs, segment_ids, w, w2, implementation, chunk_size)


def _assert_close(actual, expected, relative):
    """Within `relative` of the expected array's largest magnitude."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=relative * scale)


KERNELS = ("ssd_L1", "ssd_L64_init_seg", "ssd_L200_n128_g2_init")


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("chunked", name) for name in GOLDEN]
    + [("pallas", name) for name in KERNELS]
    + [("reference", "ssd_L64_init_seg")],
)
def test_golden_float64(implementation, name, golden, x64):
    data = golden(name)
    results = _run_golden(data, jnp.float64, implementation, 64)
    assert {f"grad_{key}" for key in INPUTS if key in data} < set(results)
    for key, value in results.items():
        assert value.dtype == jnp.float64
        if data[key].dtype == np.float64:
            np.testing.assert_allclose(np.asarray(value), data[key], rtol=1e-9, atol=1e-12)
        else:
            _assert_close(value, data[key], 2e-7)


@pytest.mark.parametrize("name", ["ssd_L513", "ssd_L128_seg"])
@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_golden_float32_is_within_1e_5_of_scale(implementation, name, golden):
    data = golden(name)
    for key, value in _run_golden(data, jnp.float32, implementation, 64).items():
        assert value.dtype == jnp.float32
        _assert_close(value, data[key], 1e-5)


def test_dropped_initial_state_has_zero_gradient(golden, x64):
    results = _run_golden(golden("ssd_L64_init_seg"), jnp.float64, "chunked", 64)
    assert np.all(np.asarray(results["grad_init"][0]) == 0)
    assert np.any(np.asarray(results["grad_init"][1]) != 0)


def _random(seed, batch=2, time=13, heads=2, head_dim=4, groups=1, state_dim=3, dtype=np.float64, max_dt=1.0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(batch, time, heads, head_dim)).astype(dtype),
        "dt": rng.uniform(0.001, max_dt, size=(batch, time, heads)).astype(dtype),
        "A": -rng.uniform(0.5, 2.0, size=heads).astype(dtype),
        "B": rng.normal(size=(batch, time, groups, state_dim)).astype(dtype),
        "C": rng.normal(size=(batch, time, groups, state_dim)).astype(dtype),
        "D": rng.normal(size=heads).astype(dtype),
        "initial_state": rng.normal(size=(batch, heads, head_dim, state_dim)).astype(dtype),
    }


def _jax(inputs):
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def _run(inputs, segment_ids=None, implementation=None, chunk_size=64):
    interpret = implementation == "pallas"
    options = {"implementation": implementation, "chunk_size": chunk_size, "interpret": interpret}
    return ssd(**inputs, segment_ids=segment_ids, **options)


_ssd = functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))(_run)


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_chunk_size_changes_nothing(chunk_size, x64):
    inputs = _jax(_random(0))
    starts = jnp.zeros((2, 13), jnp.int32).at[0, 4].set(1).at[1, 7].set(1)
    expected = _ssd(inputs, jnp.cumsum(starts, 1), implementation="reference")
    actual = _ssd(inputs, jnp.cumsum(starts, 1), chunk_size=chunk_size)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-12)


RESETS = {
    "none": [],
    "first step": [0],
    "inside a chunk": [6],
    "first step of a chunk": [4],
    "last step of a chunk": [3],
    "last step": [12],
    "two in a chunk": [5, 6],
    "every step": list(range(13)),
}


@pytest.mark.parametrize("where", RESETS)
def test_a_reset_equals_separate_sequences(where, x64):
    inputs = _jax(_random(1))
    starts = np.zeros((2, 13), np.int32)
    starts[:, RESETS[where]] = 1
    segment_ids = jnp.asarray(np.cumsum(starts, 1))
    y, final = _ssd(inputs, segment_ids, chunk_size=4)

    # Independent of the segment code: run each stretch on its own.
    edges = [0, *[r for r in RESETS[where] if r > 0], 13]
    state = inputs["initial_state"] * (0 if 0 in RESETS[where] else 1)
    pieces = []
    with jax.disable_jit():
        for begin, end in itertools.pairwise(edges):
            for t in range(begin, end):
                now = [inputs[name][:, t] for name in ("x", "dt")]
                later = [inputs[name][:, t] for name in ("B", "C")]
                y_t, state = ssd_step(state, *now, inputs["A"], *later, D=inputs["D"])
                pieces.append(y_t)
            last, state = state, jnp.zeros_like(state)
    np.testing.assert_allclose(y, jnp.stack(pieces, 1), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(final, last, rtol=1e-11, atol=1e-12)
    for actual, expected in zip(_ssd(inputs, segment_ids, implementation="pallas"), (y, final)):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_a_returning_label_is_a_new_segment():
    index = segment_index(jnp.array([[0, 0, 1, 1, 0, 0], [3, 3, 3, 2, 2, 5]]))
    np.testing.assert_array_equal(index, [[0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 2, 3]])


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_rows_are_independent_and_output_is_causal(implementation):
    inputs = _random(2, batch=3, dtype=np.float32)
    before, _ = _ssd(_jax(inputs), implementation=implementation, chunk_size=4)
    changed = {name: value.copy() for name, value in inputs.items()}
    changed["x"][1] += 1.0
    changed["dt"][1] *= 0.5
    after, _ = _ssd(_jax(changed), implementation=implementation, chunk_size=4)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2], after[2])
    assert np.abs(before[1] - after[1]).max() > 0.1
    for name in ("x", "B", "C"):
        inputs[name][:, 6:] = 100.0
    after, _ = _ssd(_jax(inputs), implementation=implementation, chunk_size=4)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_vmap_equals_loop(implementation, x64):
    seeds = [_jax(_random(seed)) for seed in range(3)]
    ids = jnp.cumsum(jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 2, 13))), axis=-1)

    def run(inputs, ids):
        def loss(inputs):
            y, final = _run(inputs, ids, implementation, 4)
            return jnp.sum(jnp.sin(y)) + jnp.sum(final)

        return jax.value_and_grad(loss)(inputs)

    batched = jax.jit(jax.vmap(run))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds), ids)
    one = jax.jit(run)
    for n, inputs in enumerate(seeds):
        value, gradients = one(inputs, ids[n])
        np.testing.assert_allclose(batched[0][n], value, rtol=1e-12)
        for name, expected in gradients.items():
            np.testing.assert_allclose(batched[1][name][n], expected, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_gradients_equal_finite_differences(implementation, x64):
    inputs = _jax(_random(9))
    ids = jnp.cumsum(jnp.zeros((2, 13), jnp.int32).at[0, 5].set(1).at[1, 0].set(1), 1)
    rng = np.random.default_rng(0)
    direction = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in inputs.items()}

    def loss(inputs):
        y, final = _run(inputs, ids, implementation, 4)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.square(final))

    value, step = jax.jit(loss), 1e-6
    there, back = ({k: v + sign * step * direction[k] for k, v in inputs.items()} for sign in (1, -1))
    slope = sum(float(jnp.vdot(g, direction[k])) for k, g in jax.jit(jax.grad(loss))(inputs).items())
    np.testing.assert_allclose((value(there) - value(back)) / (2 * step), slope, rtol=1e-7)


def test_float32_decays_are_exact_to_rounding():
    # Without the compensated sum the largest error here is 3e-6 of the scale.
    inputs = _random(5, batch=4, time=64, state_dim=1, max_dt=0.8, dtype=np.float32)
    inputs["B"][:] = inputs["C"][:] = 1.0
    inputs["D"][:] = 0.0
    y, _ = _ssd(_jax(inputs))
    x, dt = inputs["x"].astype(np.float64), inputs["dt"].astype(np.float64)
    state, exact = inputs["initial_state"][..., 0].astype(np.float64), []
    for t in range(64):
        state = np.exp(dt[:, t] * inputs["A"])[..., None] * state + dt[:, t, :, None] * x[:, t]
        exact.append(state)
    _assert_close(y, np.stack(exact, 1), 4e-7)


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_the_longest_sequences_keep_their_digits(implementation, x64):
    # 65,536 steps; decays of a step from 1e-6 to 20.
    time = 65536 if implementation == "chunked" else 4096  # the interpreter is slow
    rng = np.random.default_rng(7)
    inputs = _random(7, batch=1, time=time, heads=1, head_dim=2, state_dim=2, dtype=np.float32)
    inputs["dt"] = np.exp(rng.uniform(np.log(1e-6), np.log(10.0), (1, time, 1))).astype(np.float32)
    exact = {name: value.astype(np.float64) for name, value in inputs.items()}
    actual, expected = _ssd(_jax(inputs), implementation=implementation), _ssd(_jax(exact))
    for a, e in zip(actual, expected):
        _assert_close(a, np.asarray(e), 1e-6)


def test_step_equals_scan_and_keeps_the_state_dtype():
    inputs = _jax(_random(7, groups=2, dtype=np.float32))
    y, final = _ssd(inputs, implementation="reference")
    state = inputs["initial_state"]
    step = jax.jit(ssd_step)
    for t in range(13):
        now = [inputs[name][:, t] for name in ("x", "dt")]
        y_t, state = step(state, *now, inputs["A"], inputs["B"][:, t], inputs["C"][:, t], D=inputs["D"])
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-6)
    _, low = step(state.astype(jnp.bfloat16), *now, inputs["A"], inputs["B"][:, 0], inputs["C"][:, 0])
    assert low.dtype == jnp.bfloat16


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    implementation=st.sampled_from(["chunked", "pallas"]),
    reset_rate=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_a_split_sequence_equals_the_whole(implementation, reset_rate, seed):
    inputs, split = _random(seed, time=9, groups=2), 5
    ids = np.cumsum(np.random.default_rng(seed).random((2, 9)) < reset_rate, 1)
    with jax.enable_x64(True):
        whole = _ssd(_jax(inputs), jnp.asarray(ids), implementation="reference")
        along_time = ("x", "dt", "B", "C")
        head = inputs | {name: inputs[name][:, :split] for name in along_time}
        tail = inputs | {name: inputs[name][:, split:] for name in along_time}
        y1, state = _ssd(_jax(head), jnp.asarray(ids[:, :split]), implementation, 2)
        tail_ids = ids[:, split:] - ids[:, split - 1 : split]
        y2, final = _ssd(_jax(tail) | {"initial_state": state}, jnp.asarray(tail_ids), implementation, 2)
        np.testing.assert_allclose(jnp.concatenate([y1, y2], 1), whole[0], rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(final, whole[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "pallas"}, "'pallas' cannot run: it needs an NVIDIA GPU"),
        ({"implementation": "magic"}, "unknown implementation 'magic'"),
        ({"dt": jnp.ones((2, 12, 2))}, r"dt must be float \[B, T, H\], here \[2, 13, 2\], got float32 \[2, 12, 2\]"),
        ({"A": jnp.ones(3)}, r"A must be float \[H\], here \[2\]"),
        ({"C": jnp.ones((2, 13, 2, 3))}, r"C must be float32 \[B, T, G, N\], here \[2, 13, 1, 3\]"),
        ({"initial_state": jnp.ones((2, 2, 3, 4))}, r"initial_state must be .*, here \[2, 2, 4, 3\]"),
        ({"segment_ids": jnp.ones((2, 13), jnp.float32)}, "segment_ids must be integer"),
        ({"B": jnp.ones((2, 13, 1, 3), jnp.bfloat16)}, "B must be float32 .*, got bfloat16"),
        ({"dt": jnp.ones((2, 13, 2), jnp.int32)}, "dt must be float .*, got int32"),
        ({"B": jnp.ones((2, 13, 3, 3)), "C": jnp.ones((2, 13, 3, 3))}, "must divide the number of heads"),
        ({"x": jnp.ones((2, 13, 2))}, r"x must be float \[B, T, H, P\]"),
        ({"chunk_size": 0}, "chunk_size must be an integer from 1"),
    ],
)
def test_wrong_arguments_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        ssd(**(_jax(_random(8, dtype=np.float32)) | change))
    assert "\n" not in str(error.value)


def test_step_checks_its_arguments():
    with pytest.raises(ValueError, match="x must be"):
        ssd_step(*[jnp.ones((2, 2))] * 6)
