"""Windows that slide along an axis, computed all at once: windows of 2**k elements by joining pairs of half their size.

Nothing is ever subtracted, so no digits are lost, and a NaN affects only the windows that hold it.
"""

import numpy as np


def extremes(x: np.ndarray, size: int, extreme: np.ufunc, axis: int) -> np.ndarray:
    """The minimum (`np.minimum`) or maximum (`np.maximum`) of every window of `size` along an axis."""
    ahead = np.moveaxis(x, axis, 0)
    count, width = len(ahead) - size + 1, 1
    while 2 * width <= size:
        ahead = extreme(ahead[:-width], ahead[width:])
        width *= 2
    # A window of any size is two that overlap: elements in both do not count twice.
    found: np.ndarray = extreme(ahead[:count], ahead[size - width : size - width + count])
    return np.moveaxis(found, 0, axis)


def moments(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of every window of `size` along the first axis, and the sum of squared differences from it."""
    mean, spread, width = x, np.zeros_like(x), 1
    joined_mean, joined_spread, joined = x, spread, 0
    while True:
        if size & width:
            joined_mean, joined_spread = (
                _join(joined_mean, joined_spread, joined, mean[joined:], spread[joined:], width)
                if joined
                else (mean, spread)
            )
            joined += width
        if joined == size:
            return joined_mean, joined_spread
        mean, spread = _join(mean, spread, width, mean[width:], spread[width:], width)
        width *= 2


def _join(
    mean: np.ndarray, spread: np.ndarray, size: int, next_mean: np.ndarray, next_spread: np.ndarray, next_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The moments of adjacent windows joined to one (Chan, Golub and LeVeque 1983)."""
    count = min(len(mean), len(next_mean))
    share = next_size / (size + next_size)
    apart = next_mean[:count] - mean[:count]
    joined_spread = spread[:count] + next_spread[:count]
    squares = apart * apart
    squares *= size * share
    joined_spread += squares
    apart *= share
    apart += mean[:count]
    return apart, joined_spread
