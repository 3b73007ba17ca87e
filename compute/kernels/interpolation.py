"""Interpolation: values between samples."""

from typing import Any

import numpy as np
from jaxtyping import Float

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import working_dtype
from unlatch.compute.kernels.refusals import require_choice, require_finite, require_result_bytes

# Values are computed in blocks of about this many, to stay in the cache of one core.
_BLOCK_VALUES = 16_384

# Up to this many equations are solved faster directly than by cyclic reduction.
_DENSE_EQUATIONS = 32


@kernel(pure=True)
def interpolate(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "*batch n"], at: Float[np.ndarray, "m"], *, kind: str = "linear"
) -> Float[np.ndarray, "*batch m"]:
    """Interpolate sampled functions at other places: linearly, or by a cubic spline.

    `x` has shape (n,) and increases; `y` (…, n) has a function in every row; `at` (m,) is in `x`'s unit and any order.
    The result has shape (…, m) and the common dtype of all three; float16 gives float32. `kind` is "linear" or "cubic",
    a spline whose first two pieces are one polynomial, as are its last two (not-a-knot); three samples give a parabola,
    two a line. Places outside `x`, and NaN, give NaN. A NaN in `y` affects the pieces beside it with "linear", and its
    whole row with "cubic".

    Raises `KernelError` for an `x` that is not finite or does not increase, for fewer than two samples, for another
    kind, and when the result would be larger than 64 MiB and than 16 times its arguments. Source: C. de Boor, "A
    Practical Guide to Splines" (`scipy.interpolate.CubicSpline`; `numpy.interp`, which takes the end values outside).
    """
    require_choice("kind", kind, ("linear", "cubic"))
    _check_places(x)
    dtype = working_dtype(x, y, at)
    shape = (*y.shape[:-1], len(at))
    require_result_bytes("y, at", shape, dtype, x.nbytes + y.nbytes + at.nbytes)
    if y.size == 0 or len(at) == 0:
        return np.empty(shape, dtype)
    rows = y.reshape(-1, len(x)).astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        between = _linear if kind == "linear" else _cubic
        found: np.ndarray = between(x.astype(dtype, copy=False), rows, at.astype(dtype, copy=False))
        found[:, ~((at >= x[0]) & (at <= x[-1]))] = np.nan
    return found.reshape(shape)


def _check_places(x: np.ndarray) -> None:
    if len(x) < 2:
        raise KernelError(f"x: wanted at least 2 samples, got {len(x)}")
    require_finite("x", x)
    falls = np.flatnonzero(~(x[1:] > x[:-1]))
    if len(falls):
        place = int(falls[0])
        raise KernelError(f"x: wanted increasing places, got {x[place]} before {x[place + 1]} at [{place + 1}]")


def _pieces(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The piece in which each place lies, as the number of its first sample."""
    if len(at) > len(x) and (at[1:] >= at[:-1]).all():  # the fewer are searched among the more
        borders = np.searchsorted(at, x[1:-1], side="left")
        return np.repeat(np.arange(len(x) - 1), np.diff(borders, prepend=0, append=len(at)))
    return np.asarray(np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2))


def _linear(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    if len(y) == 1:  # numpy.interp takes a single function, but no batch
        return np.asarray(np.interp(at, x, y[0])[np.newaxis], y.dtype)
    piece = _pieces(x, at)
    left = x[piece]
    along = (at - left) / (x[piece + 1] - left)
    # A weighted sum of both ends, so that a NaN at one end does not affect the other.
    found = np.take(y, piece + 1, axis=1)
    found *= along
    rest = np.take(y, piece, axis=1)
    rest *= 1 - along
    found += rest
    found[:, along == 0] = y[:, piece[along == 0]]
    found[:, along == 1] = y[:, piece[along == 1] + 1]
    return found


def _cubic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    slopes = _slopes(x, y)
    widths = np.diff(x)
    chords = np.diff(y) / widths
    bend = (slopes[:, :-1] + slopes[:, 1:] - 2 * chords) / widths
    coefficients = (bend / widths, (chords - slopes[:, :-1]) / widths - bend, slopes, y)
    found = np.empty((len(y), len(at)), y.dtype)
    pieces = _pieces(x, at)
    block_places = max(1, _BLOCK_VALUES // len(y))
    for first in range(0, len(at), block_places):
        block = slice(first, first + block_places)
        _evaluate(coefficients, pieces[block], at[block] - x[pieces[block]], found[:, block])
    return found


def _evaluate(coefficients: tuple[np.ndarray, ...], piece: np.ndarray, along: np.ndarray, out: np.ndarray) -> None:
    total = np.take(coefficients[0], piece, axis=1)
    for coefficient in coefficients[1:]:
        total *= along
        total += np.take(coefficient, piece, axis=1)
    out[...] = total


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The spline's slopes at its samples, from the equations of a continuous second derivative."""
    widths, chords = np.diff(x), np.diff(y) / np.diff(x)
    if len(widths) == 1:
        return np.repeat(chords, 2, axis=1)
    slopes = np.empty_like(y)
    if len(widths) == 2:
        middle = (widths[1] * chords[:, 0] + widths[0] * chords[:, 1]) / (widths[0] + widths[1])
        slopes[:, 0], slopes[:, 1], slopes[:, 2] = 2 * chords[:, 0] - middle, middle, 2 * chords[:, 1] - middle
        return slopes
    left, right = widths[:-1], widths[1:]
    below, diagonal, above = right.copy(), 2 * (left + right), left.copy()
    wanted = 3 * (right * chords[:, :-1] + left * chords[:, 1:])
    # Not-a-knot, `near * slopes[0] + (near + far) * slopes[1] = end`, eliminates the outer slopes from the system.
    first = _end(widths[0], widths[1], chords[:, 0], chords[:, 1])
    last = _end(widths[-1], widths[-2], chords[:, -1], chords[:, -2])
    wanted[:, 0] -= first
    wanted[:, -1] -= last
    diagonal[0] -= left[0] + right[0]
    diagonal[-1] -= left[-1] + right[-1]
    below[0] = above[-1] = 0
    slopes[:, 1:-1] = _tridiagonal(below, diagonal, above, wanted)
    slopes[:, 0] = (first - (left[0] + right[0]) * slopes[:, 1]) / right[0]
    slopes[:, -1] = (last - (left[-1] + right[-1]) * slopes[:, -2]) / left[-1]
    return slopes


def _end(outer: Any, inner: Any, chord: np.ndarray, next_chord: np.ndarray) -> np.ndarray:
    both = outer + inner
    ended: np.ndarray = ((outer + 2 * both) * inner * chord + outer**2 * next_chord) / both
    return ended


def _tridiagonal(below: np.ndarray, diagonal: np.ndarray, above: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Solve a tridiagonal system by cyclic reduction: each pass over all rows eliminates half of the unknowns.

    No pivots are needed, since each diagonal element is larger than those beside it.
    """
    n = len(diagonal)
    if n <= _DENSE_EQUATIONS:
        dense = np.diag(diagonal) + np.diag(below[1:], -1) + np.diag(above[:-1], 1)
        solved: np.ndarray = np.linalg.solve(dense, wanted.T).T
        return solved
    # Odd unknowns stay. Each absorbs the equations of its two even neighbours; the last may have none after it.
    odd, after = np.arange(1, n, 2), np.arange(2, n, 2)
    inner = len(after)
    before = odd - 1
    ratio_before = below[odd] / diagonal[before]
    ratio_after = above[odd[:inner]] / diagonal[after]
    reduced = diagonal[odd] - ratio_before * above[before]
    reduced[:inner] -= ratio_after * below[after]
    target = wanted[:, 1::2] - ratio_before * wanted[:, before]
    target[:, :inner] -= ratio_after * wanted[:, after]
    next_above = np.zeros_like(reduced)
    next_above[:inner] = -ratio_after * above[after]
    found = np.empty_like(wanted)
    found[:, 1::2] = _tridiagonal(-ratio_before * below[before], reduced, next_above, target)
    known = wanted[:, 0::2].copy()
    known[:, 1:] -= below[after] * found[:, 1 : 2 * inner : 2]
    known[:, : len(odd)] -= above[before] * found[:, 1::2]
    found[:, 0::2] = known / diagonal[0::2]
    return found
