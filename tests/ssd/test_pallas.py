"""The kernels: every way to cut the work, their lowering for CUDA, when they are chosen, and the Mamba-2 block."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drama_jax import backbones
from drama_jax import ssd as ssd_module
from drama_jax.backbones import mamba2_mixer
from drama_jax.config import BackboneConfig, ConfigError
from drama_jax.ssd import default_implementation, fused, ssd
from drama_jax.ssd.fused import default_tiles, ssd_pallas
from drama_jax.ssd.tiles import Apart, Tiles
from tests.ssd import contract
from tests.tools import lower_for_cuda

pytestmark = pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
# The second: the last strip lies behind the end.
TILES = (
    Tiles(chunk=16, width=16, depth=32, strips=2),
    Tiles(chunk=16, width=32, depth=16, strips=4, backward_strips=3),
    Tiles(chunk=16, width=16, depth=32, strips=2, backward_strips=3, apart=Apart(depth=16, parts=2)),
)


@pytest.mark.parametrize("tiles", TILES, ids=["blocks_of_p", "pieces_of_n", "apart"])
def test_the_cut_changes_nothing(tiles, x64):
    inputs, ids, weights = contract.numbers(contract.case("resets"), jnp.float64)
    run = functools.partial(ssd_pallas, tiles=tiles, interpret=True)
    found = contract.errors(contract.results(run, inputs, ids, weights), contract.oracle(inputs, ids, weights))
    assert max(found.values()) < 1e-13


@pytest.mark.parametrize(("case", "dtype"), [("bare", jnp.float32), ("resets", jnp.bfloat16)])
def test_the_kernels_apart_keep_the_contract(case, dtype, x64):
    inputs, ids, weights = contract.numbers(contract.case(case), dtype)
    tiles = Tiles(chunk=16, width=16, depth=16, apart=Apart(depth=16))
    run = functools.partial(ssd_pallas, tiles=tiles, interpret=not contract.ON_GPU)
    found = contract.errors(contract.results(run, inputs, ids, weights), contract.oracle(inputs, ids, weights))
    assert max(found.values()) <= contract.TOLERANCE[jnp.dtype(dtype).name]


def test_all_pallas_names_are_in_one_module():
    sources = {path.name: path.read_text() for path in pathlib.Path(ssd_module.__file__).parent.glob("*.py")}
    assert [name for name, text in sources.items() if "jax.experimental" in text] == ["pallas.py"]


def specs(shape, dtype, groups=1):
    batch, time, heads, head_dim, state_dim = shape
    spec = jax.ShapeDtypeStruct
    return {
        "x": spec((batch, time, heads, head_dim), dtype),
        "dt": spec((batch, time, heads), jnp.float32),
        "A": spec((heads,), jnp.float32),
        "B": spec((batch, time, groups, state_dim), dtype),
        "C": spec((batch, time, groups, state_dim), dtype),
        "D": spec((heads,), jnp.float32),
        "initial_state": spec((batch, heads, head_dim, state_dim), jnp.float32),
    }


def gradient(inputs, ids, tiles=None):
    def loss(inputs):
        y, final = ssd_pallas(**inputs, segment_ids=ids, tiles=tiles)
        return jnp.sum(y.astype(final.dtype)) + jnp.sum(final)

    return jax.grad(loss)(inputs)


def kernels(text):
    """How often each of our kernels is called."""
    names = re.findall(r'name = "(ssd_\w+)"', text)
    return {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("shape", "strips"),
    [((16, 128, 16, 64, 16), False), ((4, 8192, 16, 64, 16), True), ((1, 65536, 24, 64, 128), True)],
    ids=["drama_train", "drama_8k", "lm_64k"],
)
def test_lowers_for_cuda(shape, strips, dtype):
    batch, time = shape[:2]
    text = lower_for_cuda(gradient, specs(shape, dtype), jax.ShapeDtypeStruct((batch, time), jnp.int32))
    apart = shape[-1] == 128 and dtype == jnp.bfloat16
    backward = ("state_gradients", "gradients_x", "gradients_keys") if apart else ("gradients",)
    once = {f"ssd_{name}": 1 for name in ("outputs", *backward)}
    assert kernels(text) == once | ({"ssd_states": 1, "ssd_states_backward": 1} if strips else {})


@pytest.mark.parametrize(("head_dim", "state_dim"), [(16, 16), (24, 40), (128, 256)])
def test_all_widths_lower_for_cuda(head_dim, state_dim, x64):
    inputs = specs((2, 100, 4, head_dim, state_dim), jnp.float32, groups=2)
    assert "ssd_gradients" in kernels(lower_for_cuda(gradient, inputs, jax.ShapeDtypeStruct((2, 100), jnp.int32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_kernels_apart_lower_for_cuda(dtype):
    inputs, ids = specs((8, 2048, 24, 64, 128), dtype), jax.ShapeDtypeStruct((8, 2048), jnp.int32)
    tiles = dataclasses.replace(default_tiles(inputs["x"], inputs["B"]), apart=Apart(depth=64, parts=2))
    found = kernels(lower_for_cuda(functools.partial(gradient, tiles=tiles), inputs, ids))
    assert found.keys() >= {"ssd_state_gradients", "ssd_gradients_x", "ssd_gradients_keys"}
    assert set(found.values()) == {1} and "ssd_gradients" not in found


def test_vmap_is_one_launch_with_a_larger_grid():
    inputs = specs((2, 32, 2, 16, 16), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((5, 2, 32), jnp.int32)
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((5, *s.shape), s.dtype), inputs)
    text = lower_for_cuda(jax.vmap(gradient), stacked, ids)
    assert kernels(text) == {"ssd_outputs": 1, "ssd_gradients": 1} and "while" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_are_added_in_float32_and_never_of_one_tf32_product(dtype):
    inputs, ids = specs((1, 512, 1, 16, 16), dtype), jax.ShapeDtypeStruct((1, 512), jnp.int32)
    text = str(jax.make_jaxpr(gradient)(inputs, ids))  # strips, outputs, gradients
    count = text.count("dot_general[")
    assert count > 10 and count == len(re.findall(r"preferred_element_type=float32", text))
    precisions = re.findall(r"\bprecision=(\w+)", text)
    # Products of two bfloat16 numbers are exact in float32 as they are.
    assert precisions == (["TF32_TF32_F32_X3"] * count if dtype == jnp.float32 else [])


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_between_the_passes_only_operands_and_chunk_states_are_kept(implementation):
    def kept(time):
        inputs = specs((2, time, 4, 64, 16), jnp.float32)
        run = contract.implementation(implementation)
        residuals = jax.eval_shape(lambda inputs: jax.vjp(lambda inputs: run(**inputs), inputs)[1], inputs)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)), inputs

    (short, _), (long, inputs) = kept(1024), kept(2048)
    assert abs(long - 2 * short) < 0.04 * long  # linear in T, but for initial states and strips of whole chunks
    chunk = 64 if implementation == "chunked" else default_tiles(inputs["x"], inputs["B"]).chunk
    operands = sum(leaf.size * leaf.dtype.itemsize for leaf in inputs.values())
    states = 2 * 4 * 2048 // chunk * 64 * 16 * 4
    # Chunked keeps x once more for D, and the states before and after the scan over chunks.
    assert long < 1.05 * (operands + states if implementation == "pallas" else 2 * operands + 3 * states)


def test_the_default_tiles_fill_the_device():
    def tiles(shape, dtype=jnp.bfloat16):
        inputs = specs(shape, dtype)
        return default_tiles(inputs["x"], inputs["B"])

    assert tiles((16, 128, 16, 64, 16)).strips == 1  # 256 programs already
    assert tiles((16, 1024, 16, 64, 16)).strips == 4
    assert tiles((16, 1024, 16, 64, 16)).backward_strips == 1
    assert tiles((4, 8192, 16, 64, 16)).strips == tiles((4, 8192, 16, 64, 16)).backward_strips == 16
    assert tiles((1, 8, 1, 16, 16)) == Tiles(chunk=16, width=16, depth=16)
    # At N = 128 no more than the device runs at once.
    for shape, strips in (((8, 2048, 24, 64, 128), 1), ((2, 8192, 24, 64, 128), 5), ((1, 65536, 24, 64, 128), 11)):
        assert tiles(shape).strips == tiles(shape).backward_strips == strips
    assert tiles((8, 2048, 24, 64, 128)).apart == Apart(depth=64)


def test_the_forward_pass_is_two_launches_and_nothing_between_them():
    text = lower_for_cuda(lambda inputs: ssd_pallas(**inputs), specs((1, 8192, 1, 64, 16), jnp.bfloat16))
    assert kernels(text) == {"ssd_states": 1, "ssd_outputs": 1}
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {"custom_call", "reshape"}


def small(dtype=jnp.float32, **sizes):
    return [jnp.zeros(s.shape, s.dtype) for s in specs((1, 8, 2, 16, 16), dtype).values()][:5]


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "message"),
    [
        ("cpu", None, jnp.float32, "needs an NVIDIA GPU of compute capability 8.0 or more, and .* is 'cpu'"),
        ("gpu", "7.5", jnp.float32, "this one's is 7.5"),
        ("gpu", "gfx942", jnp.float32, "this one's is gfx942"),
        ("gpu", "9.0", jnp.float16, "it takes bfloat16 or float32, got float16"),
    ],
)
def test_a_named_implementation_that_cannot_run_says_why(backend, capability, dtype, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    with pytest.raises(ConfigError, match=f"ssd: implementation 'pallas' cannot run: .*{message}.*; use None"):
        ssd(*small(dtype), implementation="pallas")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 2, 256, 16), "P up to 128 and N up to 256, got P=256 and N=16"),
        ((1, 8, 2, 16, 512), "got P=16 and N=512"),
        ((1024, 65536, 24, 64, 16), "offsets are of 32 bits, .*; split the batch"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, message):
    inputs = specs(shape, jnp.bfloat16)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(ssd, implementation="pallas", interpret=True), *list(inputs.values())[:5])


def test_the_default_is_decided_in_one_place(monkeypatch):
    x, _, _, B, _ = small()
    assert default_implementation(x, B) == "chunked"
    monkeypatch.setitem(ssd_module.FASTER, "float32", (x.shape[1], B.shape[3]))
    assert default_implementation(x, B) == "chunked"  # faster elsewhere, but there is no GPU here
    monkeypatch.setattr(fused, "why_not", lambda *args, **options: None)
    assert default_implementation(x, B) == "pallas"
    for wider, longer in ((1, 0), (0, 1)):
        monkeypatch.setitem(ssd_module.FASTER, "float32", (x.shape[1] - longer, B.shape[3] - wider))
        assert default_implementation(x, B) == "chunked"
    assert default_implementation(x.astype(jnp.float16), B) == "chunked"


def test_the_whole_backbone_honours_resets_through_the_kernels(monkeypatch):
    """After an episode starts inside a sequence nothing is left of the one before, convolution included."""
    config = BackboneConfig(width=16, head_dim=16, state_dim=16, num_layers=1)
    module = backbones.make(config, 3, jnp.float32)
    rng = np.random.default_rng(0)
    latent = jnp.asarray(rng.normal(size=(2, 23, 8)), jnp.float32)
    action = jnp.asarray(rng.integers(0, 3, (2, 23)), jnp.int32)
    ids = jnp.asarray(np.cumsum(np.arange(23) == 9)[None] * np.ones((2, 1)), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), latent, action)
    expected = jax.jit(module.apply)(params, latent, action, segment_ids=ids)
    calls = []

    def kernels_only(*args, chunk_size, **options):
        calls.append(chunk_size)
        return ssd(*args, implementation="pallas", interpret=True, **options)

    monkeypatch.setattr(mamba2_mixer, "ssd", kernels_only)
    actual = jax.jit(lambda *args: module.apply(*args, segment_ids=ids))(params, latent, action)
    assert len(calls) == 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)
    last, state = jax.jit(lambda *args: module.apply(*args))(params, latent[:, 9:], action[:, 9:])
    np.testing.assert_allclose(actual[0][:, 9:], last, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual[1].layers[0].ssm, state.layers[0].ssm, rtol=1e-4, atol=1e-5)
