"""Helpers shared by tests."""

import json

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def lower_for_cuda(function, *arguments):
    """The program that an H100 would be given, as text; no GPU needed. A test must let the deprecation warning pass."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def metrics_lines(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics_but_for_the_clock(run):
    """Likewise, without what depends on how fast the machine is."""
    clock = ("seconds", "charts/SPS")
    return [{tag: value for tag, value in line.items() if tag not in clock} for line in metrics_lines(run)]


def named(data, prefix):
    """The entries of a golden file under `prefix`, with the prefix removed."""
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def flat(tree):
    """{'a/b/c': array}."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def assert_trees_close(actual, expected, *, rtol, skip=(), skip_leaf=None):
    """Every array of `expected` is in `actual` and within `rtol` of its own largest value.

    Arrays under a path that starts with one of `skip` are left out if their last name is `skip_leaf`.
    """
    actual, expected = flat(actual), flat(expected)
    assert expected, "nothing to compare"
    compared = 0
    for path, value in expected.items():
        if path.startswith(tuple(skip)) and path.rsplit("/", 1)[-1] == skip_leaf and "/norm/" not in path:
            continue
        scale = np.max(np.abs(value), initial=1e-30)
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=rtol * scale, err_msg=path)
        compared += 1
    assert compared
