"""Filters of images as products with banded matrices.

Along an axis, a block of output pixels is a banded matrix of weights times the input pixels it can see, so BLAS does
the sums; the zeros beside the band cost less than NumPy's passes, one for each weight, would. What happens at borders
is folded into the bands there, and nothing is padded.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

_STRIP_ROWS = 128


class Band(NamedTuple):
    """Output pixels `pixels` of an axis are `weights` times its input pixels `seen`."""

    pixels: slice
    seen: slice
    weights: np.ndarray


def filtered(pixels: np.ndarray, down: Iterable[Band], across: Iterable[Band], dtype: np.dtype[Any]) -> np.ndarray:
    """An image of shape (h, w, channels) filtered along both axes; integers are rounded, and cut to their range.

    It is done in strips of rows, so that what a strip needs stays in the cache of one core.
    """
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    down, across = list(down), list(across)
    out = np.empty((down[-1].pixels.stop, across[-1].pixels.stop, channels), dtype)
    for strip in _strips(down):
        done = slice(strip[0].pixels.start, strip[-1].pixels.stop)
        tall = np.empty((done.stop - done.start, rows.shape[1]), rows.dtype)
        for band in strip:
            target = slice(band.pixels.start - done.start, band.pixels.stop - done.start)
            np.matmul(band.weights, rows[band.seen], out=tall[target])
        planes = np.ascontiguousarray(np.moveaxis(tall.reshape(-1, width, channels), 2, 0)).reshape(-1, width)
        smooth = np.empty((len(planes), out.shape[1]), planes.dtype)
        for band in across:
            np.matmul(planes[:, band.seen], band.weights.T, out=smooth[:, band.pixels])
        if dtype.kind in "iu":
            np.rint(smooth, out=smooth)
            np.clip(smooth, np.iinfo(dtype).min, np.iinfo(dtype).max, out=smooth)
        out[done] = np.moveaxis(smooth.reshape(channels, -1, out.shape[1]), 0, 2)
    return out


def _strips(down: list[Band]) -> Iterator[list[Band]]:
    """Neighbouring bands together, until they have rows enough to be worth BLAS's start."""
    strip: list[Band] = []
    for band in down:
        strip.append(band)
        if band.pixels.stop - strip[0].pixels.start >= _STRIP_ROWS:
            yield strip
            strip = []
    if strip:
        yield strip
