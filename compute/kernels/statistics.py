"""Summaries of many values."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Real

from unlatch import KernelError, kernel
from unlatch.compute.kernels.refusals import require_between

# One bin for every level of a 16-bit image. So a reply is at most 1 MiB.
_MAX_BINS = 65_536

# Values are converted to float64 in blocks of this many: 8 MB at a time, for arrays of any length.
_BLOCK_VALUES = 1_000_000


class HistogramCounts(NamedTuple):
    """The number of values in each bin, and the bins' edges."""

    counts: Int64[np.ndarray, "bins"]
    edges: Float64[np.ndarray, "bins+1"]


@kernel(pure=True)
def histogram(
    x: Real[np.ndarray, "..."], *, bins: int = 10, low: float = math.nan, high: float = math.nan
) -> HistogramCounts:
    """Count the values of an array in each of `bins` equal intervals between `low` and `high`.

    `x` is real and has any shape. `counts` has shape (bins,), `edges` (bins + 1,), in `x`'s unit. An interval includes
    its lower edge, the last one both edges. `low` and `high` default to the smallest and largest finite value (NaN, the
    default, means not given). Values outside, and NaN, are not counted. If both are the same number, the interval is
    that number minus and plus 0.5; for an array without finite values it is 0 to 1. Integers beyond 2**53 are rounded
    to float64.

    Raises `KernelError` for bins outside 1 to 65536, for low or high that is infinite, for low above high, and when the
    interval is too wide or too narrow for float64 to hold its edges. Source: `numpy.histogram`.
    """
    require_between("bins", bins, 1, _MAX_BINS)
    values, weights = _levels(x)
    interval = _interval(values, low, high)
    counts = np.zeros(bins, np.int64)
    try:
        edges = np.histogram_bin_edges(np.empty(0), bins, interval)
        for first in range(0, len(values), _BLOCK_VALUES):
            block = slice(first, first + _BLOCK_VALUES)
            weighted = None if weights is None else weights[block]
            counts += np.histogram(values[block].astype(np.float64, copy=False), bins, interval, weights=weighted)[0]
    except ValueError as error:  # the only one left: "Too many bins for data range"
        raise KernelError(
            f"bins: wanted no more than float64 can tell apart between {interval[0]} and {interval[1]}, got {bins}"
        ) from error
    return HistogramCounts(counts, edges)


def _levels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The values to count, and the number of occurrences of each if it is known."""
    if x.dtype.kind not in "iu" or x.dtype.itemsize > 2 or x.size < 2 ** (8 * x.dtype.itemsize):
        return x.reshape(-1), None
    # Counting an image's levels first is several times faster than placing every pixel.
    offset = int(np.iinfo(x.dtype).min)
    occurrences = np.zeros(2 ** (8 * x.dtype.itemsize), np.int64)
    flat = x.reshape(-1)
    for first in range(0, len(flat), _BLOCK_VALUES):
        shifted = flat[first : first + _BLOCK_VALUES].astype(np.intp) - offset
        occurrences += np.bincount(shifted, minlength=len(occurrences))
    present = np.flatnonzero(occurrences)
    return present + offset, occurrences[present]


def _interval(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    for name, value in (("low", low), ("high", high)):
        if math.isinf(value):
            raise KernelError(f"{name}: wanted a finite number, or NaN for the data's own, got {value}")
    if low > high:
        raise KernelError(f"low: wanted at most high, which is {high}, got {low}")
    if math.isnan(low) or math.isnan(high):
        smallest, largest = _finite_extremes(values)
        # A given bound wins: if all data is beyond it, the interval is a single number.
        low = (smallest if math.isnan(high) else min(smallest, high)) if math.isnan(low) else low
        high = max(largest, low) if math.isnan(high) else high
    if low == high:
        low, high = low - 0.5, high + 0.5
    if math.isinf(high - low):
        raise KernelError(f"high: wanted an interval whose width float64 can hold, got {low} to {high}")
    return low, high


def _finite_extremes(values: np.ndarray) -> tuple[float, float]:
    if values.size == 0:
        return 0.0, 1.0
    with np.errstate(invalid="ignore"):
        smallest, largest = float(values.min()), float(values.max())
    if math.isfinite(smallest) and math.isfinite(largest):
        return smallest, largest
    finite: np.ndarray[Any, Any] = values[np.isfinite(values)]
    return _finite_extremes(finite)
