"""Linear systems in time, solved by the exponential of their matrix."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Inexact

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import real_dtype, working_dtype
from unlatch.compute.kernels.refusals import (
    require_at_least,
    require_between,
    require_finite,
    require_result_bytes,
    require_work,
)

# The work grows with the cube of this: with the most squarings, about a minute on one core.
_MAX_SIDE = 2048

# Each doubling of the norm is one more squaring. Beyond this, one rounding error in the matrix dominates the result.
_MAX_NORM = 2.0**40

_MAX_STEPS = 10_000_000

# This many states are computed by doubling; the rest as many at a time, by one matrix product each.
_BLOCK_STEPS = 128

# The largest 1-norm for which a diagonal Padé approximant of each degree is exact to the precision (Higham 2005, table
# 2.3, and section 2 for single precision).
_NORMS = {
    np.dtype(np.float64): {
        3: 1.495585217958292e-2,
        5: 2.539398330063230e-1,
        7: 9.504178996162932e-1,
        9: 2.097847961257068,
        13: 5.371920351148152,
    },
    np.dtype(np.float32): {3: 4.258730016922831e-1, 5: 1.880152677804762, 7: 3.925724783138660},
}


class Trajectory(NamedTuple):
    """The times, and the state at each time."""

    t: Float[np.ndarray, "times"]
    y: Float[np.ndarray, "times n"]


@kernel(pure=True)
def expm(a: Inexact[np.ndarray, "n n"]) -> Inexact[np.ndarray, "n n"]:
    """Compute the exponential of a matrix.

    `a` has shape (n, n) and finite elements; the result has its shape and dtype; float16 gives float32. Values that
    exceed the dtype are infinite or NaN.

    Raises `KernelError` for elements that are not finite, for n above 2048, and for a 1-norm above 2**40. Source: N.
    Higham, "The Scaling and Squaring Method for the Matrix Exponential Revisited", SIAM J. Matrix Anal. Appl. 26
    (2005) (`scipy.linalg.expm`).
    """
    require_work("a", "a side", a.shape[0], _MAX_SIDE)
    require_finite("a", a)
    return _exponential("a", a.astype(working_dtype(a), copy=False))


@kernel(pure=True)
def integrate_linear_ode(
    a: Float[np.ndarray, "n n"], b: Float[np.ndarray, "n"], y0: Float[np.ndarray, "n"], *, duration: float, steps: int
) -> Trajectory:
    """Solve y' = a y + b from y(0) = y0, at `steps` equal steps over `duration`.

    `a` has shape (n, n), `b` and `y0` (n,); `a` is in units of one over `duration`'s. `t` has shape (steps + 1,), from
    0 to `duration`, and `y` (steps + 1, n), with `y0` first. The dtype is the arrays' common one; float16 gives
    float32. Each step is exact except for rounding (matrix exponential), also for stiff systems, so `steps` decides
    where the solution is sampled, not how exact it is. Values that exceed the dtype are infinite or NaN.

    Raises `KernelError` for elements that are not finite, for a duration that is negative or not finite, for n above
    2047, for steps outside 1 to 10 million, for `a` and `b` whose 1-norm times the step exceeds 2**40, and when the
    result would be larger than 64 MiB and than 16 times its arguments. Source: C. Van Loan, "Computing Integrals
    Involving the Matrix Exponential", IEEE Trans. Automatic Control 23 (1978) (`scipy.signal.lsim`).
    """
    require_work("a", "a side", a.shape[0], _MAX_SIDE - 1)
    require_between("steps", steps, 1, _MAX_STEPS)
    require_at_least("duration", duration, 0)
    for name, array in (("a", a), ("b", b), ("y0", y0)):
        require_finite(name, array)
    dtype = working_dtype(a, b, y0)
    require_result_bytes("steps", (steps + 1, a.shape[0] + 1), dtype, a.nbytes)
    t = np.linspace(0, duration, steps + 1, dtype=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        step = _exponential("duration", _homogeneous(a, b, dtype) * dtype.type(duration / steps))
        return Trajectory(t, _states(step, y0.astype(dtype), steps))


def _homogeneous(a: np.ndarray, b: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The matrix of the same system without `b`, for a state extended by a 1."""
    n = len(b)
    joined = np.zeros((n + 1, n + 1), dtype)
    joined[:n, :n], joined[:n, n] = a, b
    return joined


def _states(step: np.ndarray, y0: np.ndarray, steps: int) -> np.ndarray:
    n = len(y0)
    y = np.empty((steps + 1, n), y0.dtype)
    y[0] = y0
    leap, constant = step[:n, :n].T, step[:n, n]
    known = 1
    # The known states are doubled by a leap from all of them at once, until a leap is as long as a block.
    while known <= steps:
        count = min(known, _BLOCK_STEPS, steps + 1 - known)
        first = known - min(known, _BLOCK_STEPS)
        np.matmul(y[first : first + count], leap, out=y[known : known + count])
        y[known : known + count] += constant
        known += count
        if known <= _BLOCK_STEPS:
            constant = constant @ leap + constant
            leap = leap @ leap
    return y


def _exponential(argument: str, a: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        norm = float(np.abs(a).sum(axis=0, dtype=np.float64).max(initial=0))
    if not norm <= _MAX_NORM:
        raise KernelError(f"{argument}: wanted a matrix with a 1-norm of at most {_MAX_NORM:.0f}, got {norm}")
    norms = _NORMS[real_dtype(a.dtype)]
    degree = next((degree for degree, largest in norms.items() if norm <= largest), max(norms))
    squarings = max(0, math.ceil(math.log2(norm / norms[degree]))) if norm else 0
    with np.errstate(over="ignore", invalid="ignore"):
        power = _pade(a * a.dtype.type(2.0**-squarings), degree)
        for _ in range(squarings):
            power = power @ power
    return power


def _pade(a: np.ndarray, degree: int) -> np.ndarray:
    """The diagonal Padé approximant (v - u)^-1 (v + u), with odd powers in u and even powers in v."""
    weights = [_pade_weight(degree, power) for power in range(degree + 1)]
    one = np.eye(len(a), dtype=a.dtype)
    a2 = a @ a
    if degree < 13:
        odd, even, power = weights[1] * one, weights[0] * one, one
        for exponent in range(2, degree, 2):
            power = power @ a2 if exponent > 2 else a2
            odd += a.dtype.type(weights[exponent + 1]) * power
            even += a.dtype.type(weights[exponent]) * power
    else:
        # Six products, where computing each power would take seven.
        a4 = a2 @ a2
        a6 = a4 @ a2
        powers = (one, a2, a4, a6)
        odd = a6 @ _sum(weights[9::2], powers[1:]) + _sum(weights[1:9:2], powers)
        even = a6 @ _sum(weights[8::2], powers[1:]) + _sum(weights[0:8:2], powers)
    u = a @ odd
    approximant: np.ndarray = np.linalg.solve(even - u, even + u)
    return approximant


def _sum(weights: list[float], powers: tuple[np.ndarray, ...]) -> np.ndarray:
    total = np.zeros_like(powers[0])
    for weight, power in zip(weights, powers, strict=True):
        total += powers[0].dtype.type(weight) * power
    return total


def _pade_weight(degree: int, power: int) -> float:
    # Scaled so that the constant term is 1.
    return math.comb(degree, power) / math.perm(2 * degree, power)
