"""The actor's kernel, interpreted, takes the actions of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax.behaviour import gpu_actor, networks, normalisers
from tests.tools import lower_for_cuda

KEY = jax.random.key(0)
B, S, D, U, A = 19, 48, 32, 16, 6


def jitter(params):
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), params)


@pytest.fixture(scope="module")
def actor():
    net = networks.MLP(3, U, A, jnp.float32)
    mean, log_variance = 0.1 * jax.random.normal(KEY, (S + D,)), jax.random.normal(jax.random.key(1), (S + D,))
    normaliser = normalisers.InputNormaliser(mean, jnp.exp(log_variance), jnp.ones(()))
    return normaliser, jitter(net.init(KEY, jnp.zeros((1, S + D)))["params"])


def features(seed, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(seed))
    return (4 * jax.random.normal(a, (B, S))).astype(dtype), jax.random.normal(b, (B, D)).astype(dtype)


@jax.jit
def plain(key, parts, normaliser, params):
    net = networks.MLP(3, U, A, parts[0].dtype)
    logits = net.apply({"params": params}, normalisers.apply(normaliser, jnp.concatenate(parts, axis=-1)))
    return jax.random.categorical(key, logits)


kernel = jax.jit(functools.partial(gpu_actor.choose_actions, interpret=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_actions_are_those_of_the_network(actor, dtype):
    parts = features(2, dtype)
    chosen = kernel(KEY, parts, *actor)
    np.testing.assert_array_equal(chosen, plain(KEY, parts, *actor))
    assert chosen.dtype == jnp.int32 and len(np.unique(chosen)) > 2


def test_a_row_on_its_own_has_the_network_s_actions(actor):
    parts = [part[:1] for part in features(2)]
    keys = jax.random.split(KEY, 40)
    chosen = [int(kernel(key, parts, *actor)[0]) for key in keys]
    assert chosen == [int(plain(key, parts, *actor)[0]) for key in keys] and len(set(chosen)) > 2


def test_vmap_over_seeds_equals_a_loop(actor):
    normaliser, params = actor
    keys = jax.random.split(KEY, 2)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 1.1 * a]), (normaliser, params))
    parts = jax.tree.map(lambda a, b: jnp.stack([a, b]), features(3), features(4))
    batched = jax.vmap(kernel)(keys, parts, *stacked)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], (parts, *stacked))
        np.testing.assert_array_equal(batched[i], plain(keys[i], *one))


@pytest.mark.parametrize(
    ("sizes", "units", "dtype", "serves"),
    [
        ((1024, 512), 256, jnp.bfloat16, True),
        ((1024, 512), 256, jnp.float32, False),
        ((1024, 512), 200, jnp.bfloat16, False),
        ((1024, 12), 256, jnp.bfloat16, True),
    ],
)
def test_serves_what_it_was_made_for(monkeypatch, sizes, units, dtype, serves):
    parts = [jax.ShapeDtypeStruct((8, size), dtype) for size in sizes]
    params = {"output": {"kernel": jnp.zeros((units, 18))}}
    assert not gpu_actor.serves(KEY, parts, params)  # this is a CPU
    monkeypatch.setattr(gpu_actor.gpu_convolution, "available", lambda: True)
    assert gpu_actor.serves(KEY, parts, params) == serves


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize("rows", [B, 1], ids=["many", "one"])
def test_lowers_for_cuda(actor, rows):
    normaliser, params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), actor)
    parts = [jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (S, D)]
    text = lower_for_cuda(lambda *arguments: gpu_actor.choose_actions(KEY, *arguments), parts, normaliser, params)
    assert "triton" in text


def test_a_game_of_few_actions_has_the_kernel_of_all_18():
    """A narrower product of the logits spills registers: a step of Breakout took 0.9 ms more than one of Krull."""

    def operands(num_actions):
        net = networks.MLP(3, U, num_actions, jnp.float32)
        params = jax.eval_shape(net.init, KEY, jax.ShapeDtypeStruct((1, S + D), jnp.float32))["params"]
        mean = jax.ShapeDtypeStruct((S + D,), jnp.float32)
        normaliser = normalisers.InputNormaliser(mean, mean, jax.ShapeDtypeStruct((), jnp.float32))
        jaxpr = jax.make_jaxpr(gpu_actor.choose_actions.__wrapped__)(KEY, features(5), normaliser, params)
        (kernel_call,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call")
        return [variable.aval.shape for variable in kernel_call.invars]

    assert operands(4) == operands(18) != operands(33)
