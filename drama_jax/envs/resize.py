"""Area-averaging resize of frames, in numpy: what OpenCV calls INTER_AREA, without OpenCV."""

from __future__ import annotations

import numpy as np


class AreaResize:
    """Resizes [H, W, C] uint8 images to [size, size, C] by averaging the area each output pixel covers.

    From 210x160 to a power of two the results are exact, and so equal to OpenCV's bit for bit: there an average is a
    multiple of 1/525, so it is never nearer than 1/1050 to a tie, while float32 errs by less than 1e-4. (For other
    sizes ties exist, and may be rounded differently.)
    """

    def __init__(self, height: int, width: int, size: int) -> None:
        self._rows = _taps(height, size)
        self._columns = _taps(width, size)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """[H, W, C] uint8 -> [size, size, C] uint8."""
        pixels = image.astype(np.float32)
        pixels = _average(pixels.reshape(pixels.shape[0], -1), self._rows, axis=0)
        pixels = _average(pixels.reshape(-1, *image.shape[1:]), self._columns, axis=1)
        return np.rint(pixels).astype(np.uint8)


def _taps(source: int, target: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For the k-th source pixel that output pixels reach: its index and weight ([target] intp, [target] float32)."""
    # In units of 1/target source pixels, output pixel i covers [i * source, (i + 1) * source): integers throughout.
    edges = np.arange(target + 1) * source
    first = edges[:-1] // target
    reach = int(((edges[1:] - 1) // target - first).max()) + 1
    taps = []
    for k in range(reach):
        index = first + k
        overlap = np.minimum((index + 1) * target, edges[1:]) - np.maximum(index * target, edges[:-1])
        weight = np.maximum(overlap, 0) / source
        taps.append((np.minimum(index, source - 1), weight.astype(np.float32)))
    return taps


def _average(pixels: np.ndarray, taps: list[tuple[np.ndarray, np.ndarray]], axis: int) -> np.ndarray:
    shape = (-1,) + (1,) * (pixels.ndim - 1 - axis)
    index, weight = taps[0]
    total = np.take(pixels, index, axis) * weight.reshape(shape)
    for index, weight in taps[1:]:
        total += np.take(pixels, index, axis) * weight.reshape(shape)
    return total
