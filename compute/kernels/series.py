"""Rolling windows over a series."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import working_dtype
from unlatch.compute.kernels.windows import extremes, moments

_STRETCH_SAMPLES = 8192


class Rolling(NamedTuple):
    """Mean, standard deviation, minimum and maximum of each window."""

    mean: Float[np.ndarray, "*batch windows"]
    std: Float[np.ndarray, "*batch windows"]
    min: Float[np.ndarray, "*batch windows"]
    max: Float[np.ndarray, "*batch windows"]


@kernel(pure=True)
def rolling(x: Real[np.ndarray, "*batch n"], *, window: int, ddof: int = 0) -> Rolling:
    """Compute mean, standard deviation, minimum and maximum of every `window` consecutive samples.

    `x` has shape (…, n); all results have shape (…, n - window + 1) and start with the first whole window. They are
    float64, or float32 for float32 and float16; means and deviations are computed in float64. Deviations divide by
    window - `ddof`. The time grows with the logarithm of the window, and sums of large, similar samples do not cancel.
    A NaN gives NaN in the windows that hold it only; so does an infinity, in means and deviations.

    Raises `KernelError` for a window outside 1 to n and for a ddof outside 0 to window - 1. Source: T. Chan, G. Golub
    and R. LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 37 (1983)
    (`scipy.ndimage`'s filters of one dimension).
    """
    samples = x.shape[-1]
    if not 1 <= window <= samples:
        raise KernelError(f"window: wanted 1 to the {samples} samples of x, got {window}")
    if not 0 <= ddof < window:
        raise KernelError(f"ddof: wanted 0 to {window - 1}, below the window, got {ddof}")
    dtype = working_dtype(x)
    shape = (*x.shape[:-1], samples - window + 1)
    mean, std, least, most = (np.empty(shape, dtype) for _ in range(4))
    if x.size:
        rows, *outs = (array.reshape(-1, array.shape[-1]) for array in (x, mean, std, least, most))
        together = max(1, _STRETCH_SAMPLES // samples)
        for first in range(0, len(rows), together):
            _roll(rows[first : first + together], window, ddof, [out[first : first + together] for out in outs])
    return Rolling(mean, std, least, most)


def _roll(rows: np.ndarray, window: int, ddof: int, outs: list[np.ndarray]) -> None:
    """Work in stretches that stay in the cache of one core, unless a window does not fit."""
    stretch = max(_STRETCH_SAMPLES, window)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, outs[0].shape[1], stretch):
            mean, std, least, most = (out[:, first : first + stretch].T for out in outs)
            # Along the first axis, so that short rows are computed together.
            samples = np.ascontiguousarray(rows[:, first : first + len(mean) + window - 1].T)
            least[...] = extremes(samples, window, np.minimum, 0)
            most[...] = extremes(samples, window, np.maximum, 0)
            # An infinity's mean would depend on how its window is joined, so it is NaN for every window.
            numbers = np.where(np.isfinite(samples), samples, np.nan)
            mean[...], spread = moments(numbers.astype(np.float64, copy=False), window)
            std[...] = np.sqrt(spread / (window - ddof))
