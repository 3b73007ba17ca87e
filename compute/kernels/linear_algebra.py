"""Products and factors of matrices, by the BLAS and LAPACK that NumPy brings."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Inexact, Num

from unlatch import KernelError, kernel

# A result may be this large whatever the arguments are; beyond it, only in proportion to them. An outer product of two
# 8 MB vectors would be 8 TB, and two arrays of shapes (10**6, 0) and (0, 10**6) have no bytes at all.
_FREE_RESULT_BYTES = 64 * 2**20
_RESULT_PER_ARGUMENT_BYTE = 16

# Up to here float64 holds every integer, so a product of integers by BLAS is exact.
_EXACT_INTEGER = 2**53

# The work grows with the cube of this: about a minute on one core.
_MAX_SVD_SIDE = 4096


class SingularValues(NamedTuple):
    """`a = u @ diag(s) @ vt`, with `s` in descending order."""

    u: Inexact[np.ndarray, "m k"]
    s: Float[np.ndarray, "k"]
    vt: Inexact[np.ndarray, "k n"]


@kernel(pure=True)
def matmul(a: Num[np.ndarray, "m k"], b: Num[np.ndarray, "k n"]) -> Num[np.ndarray, "m n"]:
    """The matrix product of two matrices.

    `a` has shape (m, k), `b` (k, n), the result (m, n); with k = 0 it is zeros. Floats and complex numbers give NumPy's
    common dtype of both; float16 is computed in float32 and rounded once. Two integer matrices give int64, exactly.

    Raises `KernelError` when integers are so large that a sum could exceed 2**53, and when the result would be larger
    than 64 MiB and than 16 times its arguments. Source: BLAS `gemm` (`numpy.matmul`).
    """
    dtype = np.result_type(a, b)
    integers = dtype.kind in "iu"
    result_dtype = np.dtype(np.int64) if integers else dtype
    _check_result_bytes(a, b, result_dtype)
    if integers:
        _check_exact(a, b)
        dtype = np.dtype(np.float64)
    elif dtype == np.float16:  # BLAS has no such type; NumPy's own loop for it is 100 times slower
        dtype = np.dtype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        product: np.ndarray = np.matmul(a.astype(dtype, copy=False), b.astype(dtype, copy=False))
        return product.astype(result_dtype, copy=False)


@kernel(pure=True)
def svd(a: Inexact[np.ndarray, "m n"]) -> SingularValues:
    """The thin singular value decomposition of a matrix.

    `a` has shape (m, n) and finite elements. With k = min(m, n), `u` is (m, k), `s` (k,), `vt` (k, n); `u` and `vt`
    have `a`'s dtype and `s` its real one. float16 gives float32. The sign (or phase) of each pair of singular vectors
    is LAPACK's choice.

    Raises `KernelError` for elements that are not finite, for k above 4096, and when the iteration does not converge.
    Source: LAPACK `gesdd` (`scipy.linalg.svd`).
    """
    if min(a.shape) > _MAX_SVD_SIDE:
        raise KernelError(f"a: wanted a shorter side of at most {_MAX_SVD_SIDE}, got shape {a.shape}")
    if not np.isfinite(a).all():
        row, column = np.argwhere(~np.isfinite(a))[0]
        raise KernelError(f"a: wanted finite elements, got {a[row, column]} at [{row}, {column}]")
    matrix = a.astype(np.float32) if a.dtype == np.float16 else a
    try:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise KernelError(f"a: wanted a matrix whose decomposition converges, got {error}") from error
    return SingularValues(u, s, vt)


def _check_result_bytes(a: np.ndarray, b: np.ndarray, dtype: np.dtype[Any]) -> None:
    wanted = a.shape[0] * b.shape[1] * dtype.itemsize
    allowed = max(_FREE_RESULT_BYTES, _RESULT_PER_ARGUMENT_BYTE * (a.nbytes + b.nbytes))
    if wanted > allowed:
        raise KernelError(
            f"a, b: wanted a product of at most {allowed} bytes for arguments of this size, "
            f"got shapes {a.shape} and {b.shape}, whose product has {wanted}"
        )


def _check_exact(a: np.ndarray, b: np.ndarray) -> None:
    largest = a.shape[1] * _largest_magnitude(a) * _largest_magnitude(b)
    if largest > _EXACT_INTEGER:
        raise KernelError(
            f"a, b: wanted integers whose sums of products stay within 2**53, got some that may reach {largest}; "
            "send float64 for a rounded result"
        )


def _largest_magnitude(x: np.ndarray) -> int:
    # As Python's integers: the magnitude of int64's smallest does not fit int64.
    return max(abs(int(x.min())), abs(int(x.max()))) if x.size else 0
