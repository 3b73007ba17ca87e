"""Matrix factors against their definitions, and against SciPy's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.decompositions import cholesky, eigh, qr, svd

Factored = Callable[[np.ndarray[Any, Any]], object]

DTYPES = ["f2", "f4", "f8", "c8", "c16"]


def random_matrix(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Make a read-only matrix with elements from -50 to 50, for complex dtypes in both parts."""
    random = np.random.default_rng(seed)
    matrix = random.integers(-50, 51, shape).astype(dtype)
    if matrix.dtype.kind == "c":
        matrix += 1j * random.integers(-50, 51, shape)
    matrix.setflags(write=False)
    return matrix


def given_dtype(dtype: str) -> np.dtype[Any]:
    """Return the dtype that a matrix's factors have."""
    return np.dtype(np.float32 if dtype == "f2" else dtype)


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    dtype=st.sampled_from(["f2", "f4", "f8", "c8", "c16"]),
    seed=st.integers(0, 2**32),
)
def test_svd_is_what_defines_it(m: int, n: int, dtype: str, seed: int) -> None:
    """The factors multiply to the matrix, have orthonormal columns, and SciPy's singular values in descending order."""
    a = random_matrix(seed, (m, n), dtype)
    u, s, vt = svd(a)
    k = min(m, n)
    assert (u.shape, s.shape, vt.shape) == ((m, k), (k,), (k, n))
    assert u.dtype == vt.dtype == (np.float32 if dtype == "f2" else a.dtype)
    assert s.dtype == u.real.dtype
    epsilon = 100 * np.finfo(s.dtype).eps
    scale = max(float(s[0]), 1.0)
    np.testing.assert_allclose((u * s) @ vt, a, atol=epsilon * scale)
    np.testing.assert_allclose(u.conj().T @ u, np.eye(k), atol=epsilon)
    np.testing.assert_allclose(vt @ vt.conj().T, np.eye(k), atol=epsilon)
    assert (np.diff(s) <= 0).all()
    expected = scipy.linalg.svdvals(a.astype(u.dtype), check_finite=True)
    np.testing.assert_allclose(s, expected, atol=epsilon * scale)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_svd_of_nothing_is_nothing(shape: tuple[int, int]) -> None:
    """A matrix without elements has factors without singular values."""
    u, s, vt = svd(np.zeros(shape))
    assert (u.shape, s.shape, vt.shape) == ((shape[0], 0), (0,), (0, shape[1]))


@given(n=st.integers(0, 12), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_eigh_is_what_defines_it(n: int, dtype: str, seed: int) -> None:
    """Orthonormal vectors, each scaled by its value; SciPy's values, ascending; the upper triangle is not read."""
    a = random_matrix(seed, (n, n), dtype)
    values, vectors = eigh(a)
    assert vectors.dtype == given_dtype(dtype)
    assert values.dtype == vectors.real.dtype
    wide = np.tril(a, -1).astype(np.complex128)
    symmetric = wide + wide.conj().T + np.diag(np.diagonal(a).real)
    epsilon = 200 * np.finfo(values.dtype).eps
    scale = max(1.0, float(np.abs(values).max(initial=0)))
    np.testing.assert_allclose(symmetric @ vectors, vectors * values, atol=epsilon * scale)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(n), atol=epsilon)
    np.testing.assert_allclose(values, scipy.linalg.eigvalsh(symmetric) if n else [], atol=epsilon * scale)


@given(m=st.integers(0, 12), n=st.integers(0, 12), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_qr_is_what_defines_it(m: int, n: int, dtype: str, seed: int) -> None:
    """Orthonormal columns times an upper triangle, which has SciPy's magnitudes, give the matrix."""
    a = random_matrix(seed, (m, n), dtype)
    q, r = qr(a)
    k = min(m, n)
    assert (q.shape, r.shape) == ((m, k), (k, n))
    assert q.dtype == r.dtype == given_dtype(dtype)
    epsilon = 100 * np.finfo(q.dtype).eps
    np.testing.assert_allclose(q @ r, a, atol=200 * epsilon)
    np.testing.assert_allclose(q.conj().T @ q, np.eye(k), atol=epsilon)
    assert not np.tril(r, -1).any()
    if k and np.linalg.matrix_rank(a.astype(np.complex128)) == k:
        expected = scipy.linalg.qr(a.astype(np.complex128), mode="economic")[1]
        np.testing.assert_allclose(np.abs(np.diagonal(r)), np.abs(np.diagonal(expected)), rtol=1e-2, atol=1e-2)


@given(n=st.integers(0, 12), dtype=st.sampled_from(DTYPES[1:]), seed=st.integers(0, 2**32))
def test_cholesky_is_what_defines_it(n: int, dtype: str, seed: int) -> None:
    """A lower triangle times its own conjugate transpose is the matrix, and it is SciPy's."""
    half = random_matrix(seed, (n, n + 1), dtype) / 50
    a = (half @ half.conj().T + np.eye(n)).astype(dtype)
    lower = cholesky(a)
    assert lower.dtype == a.dtype
    assert not np.triu(lower, 1).any()
    epsilon = 1000 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(lower @ lower.conj().T, a, atol=epsilon)
    if n:
        np.testing.assert_allclose(lower, scipy.linalg.cholesky(a, lower=True), atol=epsilon)


def test_cholesky_refuses_what_has_no_root() -> None:
    """A symmetric matrix with a negative eigenvalue is refused."""
    with pytest.raises(KernelError, match="a: wanted a positive definite matrix"):
        cholesky(np.array([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize("factored", [svd, eigh, qr, cholesky])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_name_the_element_that_is_not_finite(factored: Factored, value: float) -> None:
    """A NaN or an infinity is refused with its place."""
    a = np.eye(4)
    a[2, 1] = value
    with pytest.raises(KernelError, match=r"a: wanted finite elements, got (nan|inf) at \[2, 1\]"):
        factored(a)


@pytest.mark.parametrize(("factored", "limit"), [(svd, 4096), (eigh, 4096), (qr, 8192), (cholesky, 8192)])
def test_factors_refuse_a_side_out_of_proportion(factored: Factored, limit: int) -> None:
    """A matrix that would take minutes is refused by its side, before anything is read."""
    with pytest.raises(KernelError, match=rf"a: wanted a .*side of at most {limit}, got {limit + 1}"):
        factored(np.broadcast_to(np.float64(0), (limit + 1, limit + 1)))
