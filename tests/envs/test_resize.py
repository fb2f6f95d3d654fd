"""Area resize against integer arithmetic. That it equals OpenCV's is shown by EnvPool's frames in test_atari."""

import numpy as np
import pytest

from drama_jax.envs.resize import AreaResize


def _covered(source, target):
    """[target, source] int: how much of each source pixel an output pixel covers, in 1/target of a pixel."""
    fine = np.repeat(np.arange(source), target)  # source pixel of each of source * target fine cells
    out = np.repeat(np.arange(target), source)
    table = np.zeros((target, source), np.int64)
    np.add.at(table, (out, fine), 1)
    return table


@pytest.mark.parametrize(("height", "width", "size"), [(210, 160, 64), (210, 160, 32), (250, 160, 64), (7, 5, 3)])
def test_equals_the_exact_average(height, width, size):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    total = np.einsum("ih,jw,hwc->ijc", _covered(height, size), _covered(width, size), image.astype(np.int64))
    area = height * width
    expected = (2 * total + area) // (2 * area)  # round half up; there are no halves in these sizes
    assert not ((2 * total) % (2 * area) == area).any()
    np.testing.assert_array_equal(AreaResize(height, width, size)(image), expected)


def test_extremes_and_identity():
    white = np.full((210, 160, 3), 255, np.uint8)
    assert (AreaResize(210, 160, 64)(white) == 255).all()
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(AreaResize(8, 8, 8)(image), image)
