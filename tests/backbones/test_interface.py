"""What every backbone promises: its forms agree, resets, independence of rows, gradients, many seeds at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import backbones
from drama_jax.config import BackboneConfig, ConfigError

NAMES = ("mamba", "gru", "transformer", "rwkv")  # mamba2 has files of its own
BATCH, TIME, LATENT, ACTIONS, POSITIONS = 3, 8, 6, 3, 10
NEVER, SPLIT = np.zeros((BATCH, TIME), np.int32), 4
RESETS = NEVER.copy()
RESETS[0, 0], RESETS[1, [3, 5]], RESETS[2, :] = 1, 1, 1  # step 0; twice in the middle; every step


@functools.cache
def config(name, num_layers=1):
    sizes = {"width": 12, "head_dim": 4, "state_dim": 3, "mixer_width": 8, "feedforward_width": 10, "chunk_size": 3}
    return BackboneConfig(name=name, num_layers=num_layers, max_length=POSITIONS, **sizes)


def weights(features):
    """Of a sum over features: a final norm makes a plain sum of squares nearly constant."""
    return np.sin(np.arange(features.size)).reshape(features.shape)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def numpy(function, **options):
    """`function` compiled, its results as numpy arrays: what a test does to jax arrays is compiled, too."""
    compiled = jax.jit(functools.partial(function, **options))
    return lambda *arguments, **named: jax.tree.map(np.asarray, compiled(*arguments, **named))


class Compiled:
    """A backbone's functions, each compiled once for all tests."""

    def __init__(self, name):
        module = self.module = backbones.make(config(name), ACTIONS, jnp.float64)

        def sequence(variables, latent, action, state, segment_ids):
            return module.apply(variables, latent, action, state=state, segment_ids=segment_ids)

        def loss(variables, latent, action, segment_ids):
            out, _ = module.apply(variables, latent, action, segment_ids=segment_ids)
            return jnp.sum(weights(out) * out)

        self.sequence = numpy(sequence)
        self.step = numpy(module.apply, method="step")
        self.window = numpy(module.apply, method="open_window", horizon=TIME - SPLIT)
        self.gradients = numpy(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), in_axes=(0, 0, None, None)))
        self.shapes = jax.eval_shape(
            module.init, jax.random.key(0), np.zeros((BATCH, TIME, LATENT)), np.zeros((BATCH, TIME), np.int32)
        )
        self.start = jax.tree.map(np.asarray, module.initial_state(BATCH))

    def steps(self, variables, latent, action, state, first):
        """Step by step, with the state of a row replaced by the initial one before each first step."""
        out = []
        for t in range(latent.shape[1]):

            def renewed(old, new, first=first[:, t]):
                return np.where(first.reshape(-1, *[1] * (old.ndim - 1)) > 0, new, old)

            state = jax.tree.map(renewed, state, self.start)
            feature, state = self.step(variables, latent[:, t], action[:, t], state)
            out.append(feature)
        return np.stack(out, 1), state


compiled = functools.cache(Compiled)


@pytest.fixture(params=NAMES)
def case(request, x64):
    rng = np.random.default_rng(0)
    latent, action = rng.normal(size=(BATCH, TIME, LATENT)), rng.integers(0, ACTIONS, (BATCH, TIME)).astype(np.int32)
    functions = compiled(request.param)
    # Larger than initial weights, and no zeros: every path must matter.
    variables = jax.tree.map(lambda leaf: 0.1 + 0.5 * rng.normal(size=leaf.shape), functions.shapes)
    return functions, variables, latent, action


def ids(first):
    return np.cumsum(first, axis=1, dtype=np.int32)


def assert_close(actual, expected):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-11), actual, expected)


@pytest.mark.parametrize("first", [NEVER, RESETS], ids=["one segment", "resets"])
def test_the_parallel_form_equals_single_steps(case, first):
    functions, variables, latent, action = case
    state = functions.start
    expected = functions.steps(variables, latent, action, state, first)
    assert_close(functions.sequence(variables, latent, action, state, ids(first)), expected)
    assert np.abs(expected[0]).std() > 0.1


@pytest.mark.parametrize("forms", ["both parallel", "steps first", "steps last"])
def test_a_sequence_may_be_cut(case, forms):
    """The second part begins with the state of the first; in one row an episode begins with it."""
    functions, variables, latent, action = case
    first = RESETS.copy()
    first[0, SPLIT] = 1
    whole = functions.sequence(variables, latent, action, functions.start, ids(first))
    state, out = functions.start, []
    for part, by_steps in ((slice(0, SPLIT), forms == "steps first"), (slice(SPLIT, None), forms == "steps last")):
        if by_steps:
            given = state, first[:, part]
            features, state = functions.steps(variables, latent[:, part], action[:, part], *given)
        else:
            given = state, ids(first[:, part])
            features, state = functions.sequence(variables, latent[:, part], action[:, part], *given)
        out.append(features)
    assert_close((np.concatenate(out, 1), state), whole)


def test_a_window_continues_the_parallel_form(case):
    functions, variables, latent, action = case
    first = RESETS.copy()
    first[:, SPLIT:] = 0
    expected, _ = functions.sequence(variables, latent, action, functions.start, ids(first))
    past = latent[:, :SPLIT], action[:, :SPLIT]
    features, window = functions.window(variables, *past, segment_ids=ids(first[:, :SPLIT]))
    out = [features]
    for t in range(SPLIT, TIME):
        feature, window = functions.step(variables, latent[:, t], action[:, t], window)
        out.append(feature[:, None])
    assert_close(np.concatenate(out, 1), expected)


def test_rows_are_independent(case):
    functions, variables, latent, action = case
    state = functions.start
    before = functions.sequence(variables, latent, action, state, ids(RESETS))
    changed = latent.copy()
    changed[1] += 1
    after = functions.sequence(
        variables, changed, (action + np.eye(BATCH, dtype=np.int32)[1][:, None]) % ACTIONS, state, ids(RESETS)
    )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before)):
        np.testing.assert_array_equal(a[::2], b[::2], err_msg=str(path))
        assert a.ndim == 1 or np.any(a[1] != b[1]), path


def test_nothing_comes_from_the_future_or_from_another_segment(case):
    functions, variables, latent, action = case
    state = functions.start
    before, _ = functions.sequence(variables, latent, action, state, ids(RESETS))
    changed = latent.copy()
    changed[:, 4] += 1
    after, _ = functions.sequence(variables, changed, action, state, ids(RESETS))
    same = np.isclose(before, after, rtol=0, atol=0).all(axis=-1)
    # Row 0 goes on after step 4, row 1 begins anew at step 5, row 2 at every step.
    expected = np.arange(TIME) != 4
    np.testing.assert_array_equal(same, [np.arange(TIME) < 4, expected, expected])


def test_gradients_equal_finite_differences_and_many_seeds_a_loop(case):
    """Four sets of parameters and latents at once: around one point for differences, far apart for the loop."""
    functions, variables, latent, action = case
    rng, point = np.random.default_rng(1), (variables, latent)
    far = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, point) for scale in (1.0, 0.9, 1.1, -1.0)]
    losses, gradients = functions.gradients(*stack(far), action, ids(RESETS))
    for (parameters, latents), loss in zip(far, losses):
        state = functions.start
        features, _ = functions.sequence(parameters, latents, action, state, ids(RESETS))
        np.testing.assert_allclose(loss, np.sum(weights(features) * features), rtol=1e-9)
    assert len(set(losses.tolist())) == 4
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(point)]
    for path, gradient in zip(paths, jax.tree.leaves(gradients)):
        assert np.isfinite(gradient).all() and np.any(gradient != 0), path
        vector = rng.normal(size=gradient.shape[1:])

        def move(at, leaf, path=path, vector=vector):
            return np.stack([leaf + h * vector if at == path else leaf for h in (-2e-5, -1e-5, 1e-5, 2e-5)])

        values, _ = functions.gradients(*jax.tree_util.tree_map_with_path(move, point), action, ids(RESETS))
        difference = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / 12e-5
        np.testing.assert_allclose(np.vdot(gradient[0], vector), difference, rtol=1e-6, atol=1e-8, err_msg=str(path))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_features_and_states_in_float32(name):
    module = backbones.make(config(name, 2), ACTIONS, jnp.bfloat16)
    latent, action = jnp.zeros((2, 5, LATENT), jnp.bfloat16), jnp.zeros((2, 5), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), latent, action)
    features, state = jax.eval_shape(module.apply, variables, latent, action)
    assert features.dtype == jnp.float32
    feature, after = jax.eval_shape(
        functools.partial(module.apply, method="step"), variables, latent[:, 0], action[:, 0], state
    )
    assert feature.dtype == jnp.float32
    fresh = jax.eval_shape(lambda: module.initial_state(2))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, after)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (fresh, fresh)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_one_clear_line(name):
    module = backbones.make(config(name, 2), ACTIONS, jnp.float32)
    latent, action = jnp.zeros((2, 3, LATENT)), jnp.zeros((2, 3), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), latent, action)
    state = module.initial_state(2)

    def refused(message, error=ValueError, method="__call__", *, latent=latent, action=action, **options):
        with pytest.raises(error, match=message):
            jax.eval_shape(
                lambda variables: module.apply(variables, latent, action, method=method, **options), variables
            )

    refused(r"latent must be float \[B, T, S\], got float32 \[2, 6\]", latent=latent[:, 0])
    refused(r"are for S \+ A = 9, got latents of S = 5 and A = 3", latent=latent[..., 1:])
    refused(r"action must be integer \[B, T\], here \[2, 3\], got float32", action=jnp.zeros((2, 3)))
    refused("segment_ids must be integer", segment_ids=action[:, 1:])
    refused("state must be of type", TypeError, state=jnp.zeros(3))
    refused("state must have 2 layers, got 1", state=state.replace(layers=state.layers[:1]))
    refused(r"backbone, state: \w+ must be", state=module.initial_state(3))
    refused("horizon must be an integer from 1", method="open_window", horizon=0)
    refused("state must be of type", TypeError, "step", latent=latent[:, 0], action=action[:, 0], state=None)


def test_a_transformer_has_so_many_positions(x64):
    """Positions past the last, and slots past a window's, are not those of another step but NaN."""
    functions = compiled("transformer")
    latent, action = np.zeros((BATCH, POSITIONS + 1, LATENT)), np.zeros((BATCH, POSITIONS + 1), np.int32)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1), functions.shapes)
    for method, steps, options in (("__call__", POSITIONS + 1, {}), ("open_window", POSITIONS, {"horizon": 1})):
        with pytest.raises(ValueError, match=r"has positions for 10 steps \(BackboneConfig.max_length\), got 11"):
            functions.module.apply(variables, latent[:, :steps], action[:, :steps], method=method, **options)
    _, window = functions.window(variables, latent[:, :SPLIT], action[:, :SPLIT], segment_ids=NEVER[:, :SPLIT])
    for held, slots, state in (
        (0, POSITIONS, functions.start),
        (SPLIT, TIME, window),
    ):
        finite = []
        for _ in range(slots + 2 - held):
            feature, state = functions.step(variables, latent[:, 0], action[:, 0], state)
            finite.append(bool(np.isfinite(feature).all()))
        assert finite == [True] * (len(finite) - 2) + [False] * 2
    held = functions.start.replace(length=np.full((BATCH,), SPLIT, np.int32))
    features, _ = functions.sequence(variables, latent[:, :TIME], action[:, :TIME], held, NEVER)
    np.testing.assert_array_equal(np.isfinite(features).all(axis=(0, 2)), SPLIT + np.arange(TIME) < POSITIONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "lstm"},
            "BackboneConfig.name must be one of 'mamba2', 'mamba', 'gru', 'transformer', 'rwkv', got 'l",
        ),
        ({"name": "transformer", "head_dim": 48}, "BackboneConfig.head_dim must divide width = 512, got 48"),
        ({"name": "rwkv", "mixer_width": 96}, "BackboneConfig.head_dim must divide mixer_width = 96, got 64"),
        ({"name": "gru", "mixer_width": -1}, "BackboneConfig.mixer_width must be >= 0, got -1"),
        ({"name": "transformer", "max_length": 0}, "BackboneConfig.max_length must be positive, got 0"),
    ],
)
def test_fields_that_cannot_work_are_one_clear_line(fields, message):
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(**fields)
