"""`matmul` against explicit sums, and the other kernels against SciPy's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.linear_algebra import lstsq, matmul, pinv, solve


def random_matrix(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Make a read-only matrix with elements from -50 to 50, for complex dtypes in both parts."""
    random = np.random.default_rng(seed)
    matrix = random.integers(0 if np.dtype(dtype).kind == "u" else -50, 51, shape).astype(dtype)
    if matrix.dtype.kind == "c":
        matrix += 1j * random.integers(-50, 51, shape)
    matrix.setflags(write=False)
    return matrix


def product_written_out(a: np.ndarray, b: np.ndarray) -> np.ndarray[Any, Any]:
    """Compute the product as a sum of outer products, without BLAS."""
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
    """Every pair of dtypes and shapes, empty ones included, gives the sum in the documented dtype."""
    a, b = random_matrix(seed, (m, k), left), random_matrix(seed + 1, (k, n), right)
    product = matmul(a, b)
    common = np.result_type(a, b)
    assert product.dtype == (np.int64 if common.kind in "iu" else common)
    # With integers below 51 only float16 has to round.
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
    """Integers that float64 cannot sum exactly are refused, and the message says what to do."""
    a = np.array([[value]], np.int64)
    with pytest.raises(KernelError, match=r"a, b: .*2\*\*53.*float64"):
        matmul(a, np.ones((1, 1), np.int64))


def test_matmul_rounds_halves_once() -> None:
    """float16 is summed in float32, beyond 2,048, where adding ones in float16 stops. Overflow is infinite."""
    ones = np.ones((1, 4100), np.float16)
    assert matmul(ones, ones.T)[0, 0] == 4100
    large = np.full((1, 2), 60_000, np.float16)
    assert np.isinf(matmul(large, large.T)[0, 0])


@pytest.mark.parametrize("shared", [0, 1])
def test_matmul_refuses_results_out_of_proportion(shared: int) -> None:
    """Small arguments cannot ask for a product of terabytes."""
    with pytest.raises(KernelError, match=r"a, b: wanted a result of at most \d+ bytes.*\(1000000, "):
        matmul(np.zeros((10**6, shared)), np.zeros((shared, 10**6)))


def well_conditioned(seed: int, n: int, dtype: str) -> np.ndarray[Any, Any]:
    """Make a read-only square matrix whose diagonal outweighs the rest."""
    matrix: np.ndarray[Any, Any] = random_matrix(seed, (n, n), dtype) + np.eye(n, dtype=dtype) * 150 * max(n, 1)
    matrix.setflags(write=False)
    return matrix


@given(
    n=sides,
    columns=st.lists(st.integers(0, 4), max_size=1),
    dtype=st.sampled_from(["f2", "f4", "f8", "c8", "c16"]),
    seed=st.integers(0, 2**32),
)
def test_solve_agrees_with_scipy(n: int, columns: list[int], dtype: str, seed: int) -> None:
    """Equations with one right-hand side, several and none are solved in every dtype."""
    a = well_conditioned(seed, n, dtype)
    b = random_matrix(seed + 1, (n, *columns), dtype)
    x = solve(a, b)
    assert x.shape == b.shape
    assert x.dtype == (np.float32 if dtype == "f2" else a.dtype)
    expected = scipy.linalg.solve(a.astype(np.complex128), b.astype(np.complex128)) if b.size else b
    np.testing.assert_allclose(x, expected, rtol=1e-3 if x.dtype.itemsize < 8 or dtype == "c8" else 1e-10, atol=1e-5)


def test_solve_refuses_a_singular_matrix() -> None:
    """Equations with no solution, or with many, are refused."""
    with pytest.raises(KernelError, match="a: wanted a matrix that can be inverted, got a singular one"):
        solve(np.ones((2, 2)), np.ones(2))


@given(
    m=sides,
    n=sides,
    columns=st.lists(st.integers(0, 3), max_size=1),
    dtype=st.sampled_from(["f4", "f8", "c16"]),
    seed=st.integers(0, 2**32),
)
def test_lstsq_agrees_with_scipy(m: int, n: int, columns: list[int], dtype: str, seed: int) -> None:
    """Too many equations, too few, and none give SciPy's solution of least norm, rank and singular values."""
    a, b = random_matrix(seed, (m, n), dtype), random_matrix(seed + 1, (m, *columns), dtype)
    x, rank, s = lstsq(a, b)
    assert x.shape == (n, *columns)
    assert x.dtype == a.dtype
    assert s.dtype == a.real.dtype
    assert s.shape == (min(m, n),)
    if a.size and b.size:
        wide_x, _, wide_rank, wide_s = scipy.linalg.lstsq(a, b)
        assert rank == wide_rank
        tolerance = 2e-3 if dtype == "f4" else 1e-8
        np.testing.assert_allclose(s, wide_s, rtol=tolerance, atol=tolerance)
        if wide_s[-1] > wide_s[0] / 100:
            np.testing.assert_allclose(x, wide_x, rtol=tolerance, atol=tolerance)
    else:
        assert not x.any()


@given(m=sides, n=sides, dtype=st.sampled_from(["f2", "f4", "f8", "c16"]), seed=st.integers(0, 2**32))
def test_pinv_is_what_defines_it(m: int, n: int, dtype: str, seed: int) -> None:
    """The four conditions of Penrose hold."""
    a = random_matrix(seed, (m, n), dtype)
    p = pinv(a, rcond=1e-4)
    assert p.shape == (n, m)
    assert p.dtype == (np.float32 if dtype == "f2" else a.dtype)
    wide, p = a.astype(np.complex128), p.astype(np.complex128)
    tolerance = 0.05 if dtype in ("f2", "f4") else 1e-8
    np.testing.assert_allclose(wide @ p @ wide, wide, atol=50 * tolerance)
    np.testing.assert_allclose(p @ wide @ p, p, atol=tolerance, rtol=tolerance)
    for product in (wide @ p, p @ wide):
        np.testing.assert_allclose(product, product.conj().T, atol=tolerance)


def test_pinv_and_lstsq_forget_what_is_below_rcond() -> None:
    """A singular value below rcond times the largest counts as zero."""
    a = np.diag([1.0, 1e-3])
    np.testing.assert_allclose(pinv(a, rcond=1e-2), np.diag([1.0, 0.0]))
    np.testing.assert_allclose(pinv(a), np.diag([1.0, 1e3]))
    assert lstsq(a, np.ones(2), rcond=1e-2).rank == 1
    np.testing.assert_allclose(lstsq(a, np.ones(2), rcond=1e-2).x, [1, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(np.full((2, 2), np.nan), np.ones(2)), r"a: wanted finite elements, got nan at \[0, 0\]"),
        (lambda: solve(np.eye(2), np.array([1, np.inf])), r"b: wanted finite elements, got inf at \[1\]"),
        (lambda: solve(np.broadcast_to(1.0, (8193, 8193)), np.ones(8193)), "a: wanted a side of at most 8192"),
        (lambda: lstsq(np.eye(2), np.array([np.nan, 1])), "b: wanted finite elements"),
        (lambda: lstsq(np.eye(2), np.ones(2), rcond=-1.0), "rcond: wanted a finite number of at least 0, got -1.0"),
        (lambda: lstsq(np.broadcast_to(1.0, (4097, 4097)), np.ones(4097)), "a: wanted a shorter side of at most 4096"),
        (lambda: lstsq(np.zeros((0, 10**7)), np.zeros((0, 10**3))), "a, b: wanted a result of at most"),
        (lambda: pinv(np.full((2, 2), np.inf)), "a: wanted finite elements"),
        (lambda: pinv(np.eye(2), rcond=-1.0), "rcond: wanted a finite number of at least 0"),
        (lambda: pinv(np.broadcast_to(1.0, (4097, 4097))), "a: wanted a shorter side of at most 4096, got 4097"),
    ],
)
def test_equations_refuse_what_they_cannot_solve(call: Callable[[], object], message: str) -> None:
    """Elements that are not finite and work out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        call()
