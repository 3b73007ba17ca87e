"""Matrix factorisations, by NumPy's LAPACK.

NumPy lets LAPACK compute in double precision for any dtype, so single-precision factors are rounded only once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Inexact

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import working_dtype
from unlatch.compute.kernels.refusals import require_finite, require_work

# The work grows with the cube of these: about a minute on one core.
_MAX_ITERATED_SIDE = 4096
_MAX_DIRECT_SIDE = 8192


class SingularValues(NamedTuple):
    """`a = u @ diag(s) @ vt`, with `s` in descending order."""

    u: Inexact[np.ndarray, "m k"]
    s: Float[np.ndarray, "k"]
    vt: Inexact[np.ndarray, "k n"]


class Eigenvalues(NamedTuple):
    """`a @ vectors = vectors * values`, with `values` in ascending order."""

    values: Float[np.ndarray, "n"]
    vectors: Inexact[np.ndarray, "n n"]


class Orthogonal(NamedTuple):
    """`a = q @ r`, with `r` zero below its diagonal."""

    q: Inexact[np.ndarray, "m k"]
    r: Inexact[np.ndarray, "k n"]


@kernel(pure=True)
def svd(a: Inexact[np.ndarray, "m n"]) -> SingularValues:
    """Compute the thin singular value decomposition of a matrix.

    `a` has shape (m, n) and finite elements. With k = min(m, n), `u` is (m, k), `s` (k,), `vt` (k, n); `u` and `vt`
    have `a`'s dtype and `s` its real one. float16 gives float32. The sign (or phase) of each pair of singular vectors
    is LAPACK's choice.

    Raises `KernelError` for elements that are not finite, for k above 4096, and when the iteration does not converge.
    Source: LAPACK `gesdd` (`scipy.linalg.svd`).
    """
    require_work("a", "a shorter side", min(a.shape), _MAX_ITERATED_SIDE)
    try:
        return SingularValues(*np.linalg.svd(_matrix(a), full_matrices=False))
    except np.linalg.LinAlgError as error:
        raise KernelError(f"a: wanted a matrix whose decomposition converges, got {error}") from error


@kernel(pure=True)
def eigh(a: Inexact[np.ndarray, "n n"]) -> Eigenvalues:
    """Compute the eigenvalues and eigenvectors of a symmetric (or Hermitian) matrix.

    `a` has shape (n, n) and finite elements; only its lower triangle is read, so it is taken to be symmetric. `values`
    has shape (n,), ascending, in `a`'s real dtype; the columns of `vectors`, shape (n, n), are orthonormal and have
    `a`'s dtype. float16 gives float32. The sign (or phase) of each vector is LAPACK's choice.

    Raises `KernelError` for elements that are not finite, for n above 4096, and when the iteration does not converge.
    Source: LAPACK `syevd`, `heevd` (`scipy.linalg.eigh`).
    """
    require_work("a", "a side", a.shape[0], _MAX_ITERATED_SIDE)
    try:
        return Eigenvalues(*np.linalg.eigh(_matrix(a)))
    except np.linalg.LinAlgError as error:
        raise KernelError(f"a: wanted a matrix whose decomposition converges, got {error}") from error


@kernel(pure=True)
def qr(a: Inexact[np.ndarray, "m n"]) -> Orthogonal:
    """Compute the QR decomposition of a matrix: orthonormal columns and an upper triangle.

    `a` has shape (m, n) and finite elements. With k = min(m, n), `q` is (m, k) and `r` (k, n), in `a`'s dtype; float16
    gives float32. The sign (or phase) of `r`'s diagonal is LAPACK's choice.

    Raises `KernelError` for elements that are not finite and for k above 8192. Source: LAPACK `geqrf`
    (`scipy.linalg.qr` with `mode="economic"`).
    """
    require_work("a", "a shorter side", min(a.shape), _MAX_DIRECT_SIDE)
    return Orthogonal(*np.linalg.qr(_matrix(a)))


@kernel(pure=True)
def cholesky(a: Inexact[np.ndarray, "n n"]) -> Inexact[np.ndarray, "n n"]:
    """Compute the lower triangle l of a positive definite matrix, with `a = l @ l.conj().T`.

    `a` has shape (n, n) and finite elements; only its lower triangle is read, so it is taken to be symmetric (or
    Hermitian). The result has `a`'s shape and dtype; float16 gives float32.

    Raises `KernelError` for elements that are not finite, for a matrix that is not positive definite, and for n above
    8192. Source: LAPACK `potrf` (`scipy.linalg.cholesky` with `lower=True`).
    """
    require_work("a", "a side", a.shape[0], _MAX_DIRECT_SIDE)
    try:
        lower: np.ndarray = np.linalg.cholesky(_matrix(a))
    except np.linalg.LinAlgError as error:
        raise KernelError("a: wanted a positive definite matrix, got one that is not") from error
    return lower


def _matrix(a: np.ndarray) -> np.ndarray:
    require_finite("a", a)
    return a.astype(working_dtype(a), copy=False)
