"""Operations on the histogram of an image's levels: thresholds, and equalisation."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Real, UInt

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import image_dtype
from unlatch.compute.kernels.refusals import require_work

# Number of levels in which a channel of floats is counted, between its smallest and largest value.
_FLOAT_LEVELS = 256

# Every channel has its own histogram, even if it has few pixels: at the limit this takes about a minute.
_MAX_LEVELS = 2**28

# Pixels are counted in blocks of this many: 8 MB at a time, however large the image.
_BLOCK_PIXELS = 1_000_000

_PAIRED_PIXELS = 262_144


class Threshold(NamedTuple):
    """The threshold of each channel, and the pixels above it."""

    threshold: Float64[np.ndarray, "*channels"]
    above: Bool[np.ndarray, "h w *channels"]


@kernel(pure=True)
def threshold_otsu(image: Real[np.ndarray, "h w *channels"]) -> Threshold:
    """Find the threshold that best separates an image into dark and bright, and return the bright part.

    `image` has shape (h, w) or (h, w, channels) and holds floats or 8- or 16-bit integers. `threshold` is a single
    number or has shape (channels,): of all levels that pixels have, the one for which the pixels up to it and those
    above it vary least about their means (the lowest such, in a channel of one level that level). `above` has the
    image's shape. Floats are counted in 256 levels between the smallest and the largest finite one, and the threshold
    is a level's upper edge; NaN is counted nowhere and above nothing. A channel without finite pixels has threshold
    NaN.

    Raises `KernelError` for other dtypes, and for channels times levels above 2**28. Source: N. Otsu, "A Threshold
    Selection Method from Gray-Level Histograms", IEEE Trans. SMC 9 (1979).
    """
    image_dtype(image)
    _check_levels(image)
    channels = image.reshape(*image.shape[:2], math.prod(image.shape[2:]))
    thresholds = np.array([_threshold(channels[..., channel]) for channel in range(channels.shape[2])], np.float64)
    thresholds = thresholds.reshape(image.shape[2:])
    if image.dtype.kind in "iu" and image.size:
        return Threshold(thresholds, image > thresholds.astype(image.dtype))
    return Threshold(thresholds, image > thresholds)


@kernel(pure=True)
def equalize_histogram(image: UInt[np.ndarray, "h w *channels"]) -> UInt[np.ndarray, "h w *channels"]:
    """Spread the levels of an image so that all are about equally frequent, which adds contrast.

    `image` has shape (h, w) or (h, w, channels) and holds uint8 or uint16; the result has its shape and dtype, and
    treats each channel by itself. A level becomes the share of pixels that are darker, of all but the brightest, in
    levels; a channel of one level stays as it is.

    Raises `KernelError` for other dtypes, and for channels times levels (256 or 65536) above 2**28. Source: Pillow's
    `ImageOps.equalize`, which takes a whole number of pixels for each level.
    """
    if image.dtype.itemsize > 2:
        raise KernelError(f"image: wanted uint8 or uint16, got {image.dtype}")
    _check_levels(image)
    channels = image.reshape(*image.shape[:2], math.prod(image.shape[2:]))
    equalized = np.empty_like(channels)
    for channel in range(channels.shape[2]):
        plane = np.ascontiguousarray(channels[..., channel])
        equalized[..., channel] = _looked_up(plane, _spread(_counts(plane)).astype(image.dtype))
    return equalized.reshape(image.shape)


def _check_levels(image: np.ndarray) -> None:
    levels = 2 ** (8 * image.itemsize) if image.dtype.kind in "iu" else _FLOAT_LEVELS
    require_work("image", "channels times levels", math.prod(image.shape[2:]) * levels, _MAX_LEVELS)


def _looked_up(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    if plane.itemsize > 1:
        return np.take(table, plane)
    # NumPy would first make an index of eight bytes for each pixel; Python's table of bytes does not.
    return np.frombuffer(plane.tobytes().translate(table.tobytes()), np.uint8).reshape(plane.shape)


def _counts(channel: np.ndarray) -> np.ndarray:
    """Counts of each level of an integer dtype, with the smallest level first."""
    levels = 2 ** (8 * channel.dtype.itemsize)
    flat = channel.reshape(-1).view(f"u{channel.dtype.itemsize}")
    if levels == 256 and len(flat) >= _PAIRED_PIXELS:  # two bytes are counted as fast as one
        pairs, rest = flat[: len(flat) // 2 * 2].view(np.uint16), flat[len(flat) // 2 * 2 :]
        counted = _bincount(pairs, 65_536).reshape(256, 256)
        counts = counted.sum(axis=0) + counted.sum(axis=1) + _bincount(rest, 256)
    else:
        counts = _bincount(flat, levels)
    # Levels of a signed dtype wrap around: its negative levels are the upper half.
    return np.asarray(np.roll(counts, levels // 2)) if channel.dtype.kind == "i" else counts


def _bincount(flat: np.ndarray, levels: int) -> np.ndarray:
    counts = np.zeros(levels, np.int64)
    for first in range(0, len(flat), _BLOCK_PIXELS):
        counts += np.bincount(flat[first : first + _BLOCK_PIXELS], minlength=levels)
    return counts


def _spread(counts: np.ndarray) -> np.ndarray:
    """The new level of each old one: the number of darker pixels, in steps of an equal share."""
    present = counts[counts > 0]
    share = present[:-1].sum() / (len(counts) - 1)
    if share == 0:
        return np.arange(len(counts))
    darker = np.cumsum(counts) - counts
    return np.asarray(np.minimum(np.floor(darker / share + 0.5), len(counts) - 1))


def _threshold(channel: np.ndarray) -> float:
    if channel.dtype.kind in "iu":
        counts = _counts(channel)
        levels = np.arange(len(counts)) + int(np.iinfo(channel.dtype).min)
        return _best(counts, levels.astype(np.float64), levels.astype(np.float64))
    finite: np.ndarray[Any, Any] = channel[np.isfinite(channel)].astype(np.float64)
    if finite.size == 0:
        return math.nan
    # In halves, since the width of an interval may exceed float64.
    finite /= 2
    low = float(finite.min())
    width = float(finite.max()) - low
    if width == 0:
        return 2 * low
    edges = 2 * (low + width * np.linspace(0, 1, _FLOAT_LEVELS + 1))
    finite -= low
    finite /= width
    finite *= _FLOAT_LEVELS
    places = np.minimum(finite.astype(np.intp), _FLOAT_LEVELS - 1)
    # Variances of level numbers equal those of the levels, except for a factor.
    return _best(np.bincount(places, minlength=_FLOAT_LEVELS), np.arange(float(_FLOAT_LEVELS)), edges[1:])


def _best(counts: np.ndarray, levels: np.ndarray, thresholds: np.ndarray) -> float:
    """The threshold with the largest variance between the two parts, which means the smallest within them."""
    present = counts > 0
    counts, levels, thresholds = counts[present], levels[present], thresholds[present]
    if len(counts) == 0:
        return math.nan
    # Relative to the middle level, since sums of large, similar levels would cancel.
    levels = levels - levels[len(levels) // 2]
    below, total = np.cumsum(counts)[:-1], counts.sum()
    below_sum, total_sum = np.cumsum(counts * levels)[:-1], float((counts * levels).sum())
    if len(below) == 0:
        return float(thresholds[0])
    above = total - below
    apart = below_sum / below - (total_sum - below_sum) / above
    return float(thresholds[np.argmax(below / total * (above / total) * apart**2)])
