"""Matrix products and linear equations, by NumPy's BLAS and LAPACK.

NumPy lets LAPACK compute in double precision for any dtype, so single-precision solutions are rounded only once.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Inexact, Int64, Num

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import real_dtype, working_dtype
from unlatch.compute.kernels.refusals import require_at_least, require_finite, require_result_bytes, require_work

# Up to this value float64 holds every integer, so a product of integers by BLAS is exact.
_EXACT_INTEGER = 2**53

# The work grows with the cube of these: about a minute on one core.
_MAX_SOLVE_SIDE = 8192
_MAX_SVD_SIDE = 4096


class LeastSquares(NamedTuple):
    """The solution of least norm, the matrix's rank, and its singular values in descending order."""

    x: Inexact[np.ndarray, "n *columns"]
    rank: Int64[np.ndarray, ""]
    s: Float[np.ndarray, "k"]


@kernel(pure=True)
def matmul(a: Num[np.ndarray, "m k"], b: Num[np.ndarray, "k n"]) -> Num[np.ndarray, "m n"]:
    """Compute the matrix product of two matrices.

    `a` has shape (m, k), `b` (k, n), the result (m, n); with k = 0 it is zeros. Floats and complex numbers give NumPy's
    common dtype of both; float16 is computed in float32 and rounded once. Two integer matrices give int64, exactly.

    Raises `KernelError` when integers are so large that a sum could exceed 2**53, and when the result would be larger
    than 64 MiB and than 16 times its arguments. Source: BLAS `gemm` (`numpy.matmul`).
    """
    dtype = np.result_type(a, b)
    integers = dtype.kind in "iu"
    result_dtype = np.dtype(np.int64) if integers else dtype
    require_result_bytes("a, b", (a.shape[0], b.shape[1]), result_dtype, a.nbytes + b.nbytes)
    if integers:
        _check_exact(a, b)
    dtype = working_dtype(a, b)  # NumPy's own loop for float16 is 100 times slower than BLAS for float32
    with np.errstate(over="ignore", invalid="ignore"):
        product: np.ndarray = np.matmul(a.astype(dtype, copy=False), b.astype(dtype, copy=False))
        return product.astype(result_dtype, copy=False)


@kernel(pure=True)
def solve(a: Inexact[np.ndarray, "n n"], b: Inexact[np.ndarray, "n *columns"]) -> Inexact[np.ndarray, "n *columns"]:
    """Solve the linear equations `a @ x = b`.

    `a` has shape (n, n), `b` (n,) or (n, columns): one right-hand side or several; the result has `b`'s shape. The
    dtype is the common one of both; float16 gives float32. Nothing warns of a matrix that is nearly singular.

    Raises `KernelError` for elements that are not finite, for a singular matrix, and for n above 8192. Source: LAPACK
    `gesv` (`scipy.linalg.solve`).
    """
    require_work("a", "a side", a.shape[0], _MAX_SOLVE_SIDE)
    require_finite("a", a)
    require_finite("b", b)
    dtype = working_dtype(a, b)
    columns = b.reshape(b.shape[0], math.prod(b.shape[1:])).astype(dtype, copy=False)
    try:
        return np.linalg.solve(a.astype(dtype, copy=False), columns).reshape(b.shape)
    except np.linalg.LinAlgError as error:
        raise KernelError("a: wanted a matrix that can be inverted, got a singular one") from error


@kernel(pure=True)
def lstsq(
    a: Inexact[np.ndarray, "m n"], b: Inexact[np.ndarray, "m *columns"], *, rcond: float = math.nan
) -> LeastSquares:
    """Find the least squares solution x of `a @ x = b`; of several solutions, the one with the least norm.

    `a` has shape (m, n), `b` (m,) or (m, columns); `x` is (n,) or (n, columns), `rank` a single number, `s` has shape
    (min(m, n),). Singular values below `rcond` times the largest count as zero; NaN, the default, stands for the
    dtype's epsilon times max(m, n). The dtype is the common one of both (`s`: its real one); float16 gives float32.

    Raises `KernelError` for elements that are not finite, for a negative rcond, for min(m, n) above 4096, when x would
    be larger than 64 MiB and than 16 times its arguments, and when the iteration does not converge. Source: LAPACK
    `gelsd` (`scipy.linalg.lstsq`).
    """
    require_work("a", "a shorter side", min(a.shape), _MAX_SVD_SIDE)
    require_finite("a", a)
    require_finite("b", b)
    dtype = working_dtype(a, b)
    shape = (a.shape[1], *b.shape[1:])
    require_result_bytes("a, b", shape, dtype, a.nbytes + b.nbytes)
    if min(a.size, b.size) == 0:
        rank = 0 if a.size == 0 else np.linalg.matrix_rank(a.astype(dtype), rtol=_rcond(a, rcond))
        s = np.linalg.svd(a.astype(dtype), compute_uv=False)
        return LeastSquares(np.zeros(shape, dtype), np.array(rank, np.int64), s)
    columns = b.reshape(b.shape[0], -1).astype(dtype, copy=False)
    try:
        x, _, rank, s = np.linalg.lstsq(a.astype(dtype, copy=False), columns, rcond=_rcond(a, rcond))
    except np.linalg.LinAlgError as error:
        raise KernelError(f"a: wanted a matrix whose decomposition converges, got {error}") from error
    return LeastSquares(x.reshape(shape), np.array(rank, np.int64), s)


@kernel(pure=True)
def pinv(a: Inexact[np.ndarray, "m n"], *, rcond: float = math.nan) -> Inexact[np.ndarray, "n m"]:
    """Compute the Moore-Penrose inverse of a matrix.

    `a` has shape (m, n), the result (n, m) and `a`'s dtype; float16 gives float32. Singular values below `rcond` times
    the largest count as zero; NaN, the default, stands for the dtype's epsilon times max(m, n).

    Raises `KernelError` for elements that are not finite, for a negative rcond, for min(m, n) above 4096, and when the
    iteration does not converge. Source: LAPACK `gesdd` (`scipy.linalg.pinv`).
    """
    require_work("a", "a shorter side", min(a.shape), _MAX_SVD_SIDE)
    require_finite("a", a)
    try:
        inverse: np.ndarray = np.linalg.pinv(a.astype(working_dtype(a), copy=False), rcond=_rcond(a, rcond))
    except np.linalg.LinAlgError as error:
        raise KernelError(f"a: wanted a matrix whose decomposition converges, got {error}") from error
    return inverse


def _rcond(a: np.ndarray, given: float) -> float:
    if math.isnan(given):
        return float(np.finfo(real_dtype(working_dtype(a))).eps * max(a.shape))
    require_at_least("rcond", given, 0)
    return given


def _check_exact(a: np.ndarray, b: np.ndarray) -> None:
    largest = a.shape[1] * _largest_magnitude(a) * _largest_magnitude(b)
    if largest > _EXACT_INTEGER:
        raise KernelError(
            f"a, b: wanted integers whose sums of products stay within 2**53, got some that may reach {largest}; "
            "send float64 for a rounded result"
        )


def _largest_magnitude(x: np.ndarray) -> int:
    # As Python's integers, since the magnitude of int64's smallest value exceeds int64.
    return max(abs(int(x.min())), abs(int(x.max()))) if x.size else 0
