"""`matmul` against sums written out, `svd` against what defines it."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from compute.kernels.linear_algebra import matmul, svd
from unlatch import KernelError


def random_matrix(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """A read-only matrix with elements from -50 to 50, complex ones in both parts."""
    random = np.random.default_rng(seed)
    matrix = random.integers(0 if np.dtype(dtype).kind == "u" else -50, 51, shape).astype(dtype)
    if matrix.dtype.kind == "c":
        matrix += 1j * random.integers(-50, 51, shape)
    matrix.setflags(write=False)
    return matrix


def product_written_out(a: np.ndarray, b: np.ndarray) -> np.ndarray[Any, Any]:
    """The product as a sum of outer products, with no BLAS in it."""
    wide = np.result_type(a, b, np.int64)
    return np.asarray((a.astype(wide)[:, :, np.newaxis] * b.astype(wide)[np.newaxis]).sum(axis=1))


sides = st.integers(0, 9)


@given(
    m=sides,
    k=sides,
    n=sides,
    left=st.sampled_from(["i1", "u1", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]),
    right=st.sampled_from(["i2", "u4", "i8", "f2", "f4", "f8", "c8"]),
    seed=st.integers(0, 2**32),
)
def test_matmul_is_the_sum_of_outer_products(m: int, k: int, n: int, left: str, right: str, seed: int) -> None:
    """Every pair of dtypes and shapes, empty ones included, gives the sum in the dtype promised."""
    a, b = random_matrix(seed, (m, k), left), random_matrix(seed + 1, (k, n), right)
    product = matmul(a, b)
    common = np.result_type(a, b)
    assert product.dtype == (np.int64 if common.kind in "iu" else common)
    # Integers below 51 leave float16 alone to round.
    np.testing.assert_allclose(product, product_written_out(a, b), rtol=1e-3 if common == np.float16 else 1e-6)


def test_matmul_of_bytes_does_not_wrap() -> None:
    """Two matrices of uint8 give sums beyond 255."""
    a = np.full((2, 300), 255, np.uint8)
    assert (matmul(a, a.T) == 255 * 255 * 300).all()


def test_matmul_of_large_integers_is_exact() -> None:
    """An integer sum just within 2**53 comes out to the last unit."""
    a = np.array([[2**52 - 3, 2]], np.int64)
    assert matmul(a, np.array([[1], [1]], np.int64)).tolist() == [[2**52 - 1]]


@pytest.mark.parametrize("value", [2**53 + 1, -(2**63)])
def test_matmul_refuses_integers_it_could_round(value: int) -> None:
    """Integers that float64 can't sum exactly are refused, with the way out in the message."""
    a = np.array([[value]], np.int64)
    with pytest.raises(KernelError, match=r"a, b: .*2\*\*53.*float64"):
        matmul(a, np.ones((1, 1), np.int64))


def test_matmul_rounds_halves_once() -> None:
    """float16 is summed in float32, beyond the 2,048 where adding ones in float16 ends; overflow is infinite."""
    ones = np.ones((1, 4100), np.float16)
    assert matmul(ones, ones.T)[0, 0] == 4100
    large = np.full((1, 2), 60_000, np.float16)
    assert np.isinf(matmul(large, large.T)[0, 0])


@pytest.mark.parametrize("shared", [0, 1])
def test_matmul_refuses_results_out_of_proportion(shared: int) -> None:
    """Small arguments can't ask for a product of terabytes."""
    with pytest.raises(KernelError, match=r"a, b: wanted a product of at most \d+ bytes.*\(1000000, "):
        matmul(np.zeros((10**6, shared)), np.zeros((shared, 10**6)))


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_svd_names_the_element_that_is_not_finite(value: float) -> None:
    """A NaN or an infinity is refused with its place."""
    a = np.ones((3, 4))
    a[1, 2] = value
    with pytest.raises(KernelError, match=r"a: wanted finite elements, got (nan|inf) at \[1, 2\]"):
        svd(a)


def test_svd_refuses_a_side_out_of_proportion() -> None:
    """A matrix that would take minutes is refused by its shape, before anything is read."""
    with pytest.raises(KernelError, match=r"a: wanted a shorter side of at most 4096, got shape \(4097, 4097\)"):
        svd(np.broadcast_to(np.float64(0), (4097, 4097)))
