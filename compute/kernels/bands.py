"""Image filters as products with banded matrices.

Along an axis, a block of output pixels is a banded matrix of weights times the input pixels that it depends on. So BLAS
does the sums; the zeros beside the band cost less than NumPy's passes would, one for each weight. Borders are included
in the weights of the bands there, and nothing is padded.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

_STRIP_ROWS = 128


class Band(NamedTuple):
    """A block of an axis: the output pixels `pixels` are `weights` times the input pixels `seen`."""

    pixels: slice
    seen: slice
    weights: np.ndarray


def filtered(pixels: np.ndarray, down: Iterable[Band], across: Iterable[Band], dtype: np.dtype[Any]) -> np.ndarray:
    """Filter an image of shape (h, w, channels) along both axes. Integers are rounded and clipped to their range.

    The filter works on strips of rows, so that the data of one strip stays in the cache of one core.
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
    """Group neighbouring bands until they have enough rows to be worth the overhead of a BLAS call."""
    strip: list[Band] = []
    for band in down:
        strip.append(band)
        if band.pixels.stop - strip[0].pixels.start >= _STRIP_ROWS:
            yield strip
            strip = []
    if strip:
        yield strip
