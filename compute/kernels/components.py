"""Connected shapes in a mask.

Pixels are grouped into runs along rows, since there are fewer runs than pixels. Runs that touch in neighbouring rows
are found by comparing each row with the next, and are joined by union-find over whole arrays at a time.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from unlatch import KernelError, kernel
from unlatch.compute.kernels.refusals import require_work

_MAX_PIXELS = 2**31 - 1


class Labels(NamedTuple):
    """Each pixel's component (from 1, or 0 for none), and the number of components."""

    labels: Int32[np.ndarray, "h w"]
    components: Int64[np.ndarray, ""]


@kernel(pure=True)
def connected_components(mask: Shaped[np.ndarray, "h w"], *, connectivity: int = 4) -> Labels:
    """Number the connected shapes of a mask, in the order in which rows are read.

    `mask` has shape (h, w) and holds bools or numbers; pixels that are not zero belong to a shape (also NaN). With
    `connectivity` 4 pixels touch along edges, with 8 also at corners. `labels` has shape (h, w), `components` is a
    single number.

    Raises `KernelError` for another dtype or connectivity, and for 2**31 pixels and more. Source: A. Rosenfeld and J.
    Pfaltz, "Sequential Operations in Digital Picture Processing", J. ACM 13 (1966) (`scipy.ndimage.label`).
    """
    if connectivity not in (4, 8):
        raise KernelError(f"connectivity: wanted 4 or 8, got {connectivity}")
    if mask.dtype.kind not in "biufc":
        raise KernelError(f"mask: wanted bools or numbers, got {mask.dtype}")
    require_work("mask", "a number of pixels", mask.size, _MAX_PIXELS)
    height, width = mask.shape
    if mask.size == 0:
        return Labels(np.zeros(mask.shape, np.int32), np.array(0))
    # A column of zeros at the right ends every row's last run, and separates rows when corners are compared.
    fenced = np.zeros((height, width + 1), np.bool_)
    np.not_equal(mask, 0, out=fenced[:, :-1])
    flat = fenced.reshape(-1)
    # Gaps and runs alternate, a gap first. All rows end with a gap; before a run at the very start it has length 0.
    lengths = np.diff(np.flatnonzero(flat[1:] != flat[:-1]) + 1, prepend=0, append=flat.size)
    if flat[0]:
        lengths = np.concatenate([[0], lengths])
    runs = len(lengths) // 2
    at = _painted(np.arange(runs), lengths)
    upper, lower = _touching(flat, width + 1, corners=connectivity == 8)
    roots = _joined(runs, at[upper], at[lower])
    is_first = roots == np.arange(runs)
    labels = _painted(np.cumsum(is_first)[roots], lengths).reshape(height, width + 1)
    return Labels(labels[:, :-1], is_first.sum())


def _painted(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Fill each run's pixels with the run's value, and gaps with zero."""
    by_turns = np.zeros(len(lengths), np.int32)
    by_turns[1::2] = values
    return np.repeat(by_turns, lengths)


def _beginnings(flat: np.ndarray) -> np.ndarray:
    """Pixels that are set while the one before them is not."""
    beginnings: np.ndarray = flat.copy()
    beginnings[1:] &= ~flat[:-1]
    return beginnings


def _touching(flat: np.ndarray, row: int, *, corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of touching pixels, the second in the row below; at least one pair for every two runs that touch."""
    above, below = flat[:-row], flat[row:]
    upper = np.flatnonzero(_beginnings(above & below))
    if not corners:
        return upper, upper + row
    # Runs that touch only at a corner.
    falling = np.flatnonzero(above[:-1] & below[1:] & ~above[1:] & ~below[:-1])
    rising = np.flatnonzero(above[1:] & below[:-1] & ~above[:-1] & ~below[1:])
    return np.concatenate([upper, falling, rising + 1]), row + np.concatenate([upper, falling + 1, rising])


def _joined(runs: int, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The first run of each run's component."""
    roots = np.arange(runs)
    # If one run should be joined to several, any of them may win: the others are handled below.
    roots[np.maximum(upper, lower)] = np.minimum(upper, lower)
    while not np.array_equal(further := roots[roots], roots):
        roots = further
    upper, lower = roots[upper], roots[lower]
    apart = upper != lower
    if not apart.any():
        return roots
    # The remaining joins are far fewer: trees of runs, represented by their roots.
    is_root = roots == np.arange(runs)
    number = np.cumsum(is_root) - 1
    joined = _joined(int(number[-1]) + 1, number[upper[apart]], number[lower[apart]])
    found: np.ndarray = np.flatnonzero(is_root)[joined][number[roots]]
    return found
