"""`fft` against SciPy's, and against the sum that defines it."""

from typing import Any

import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st

from compute.kernels.signals import fft


def random_signal(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """A read-only array of normal noise, complex noise for a complex dtype."""
    random = np.random.default_rng(seed)
    signal = random.standard_normal(shape).astype(dtype)
    if signal.dtype.kind == "c":
        signal += (1j * random.standard_normal(shape)).astype(dtype)
    signal.setflags(write=False)
    return signal


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 70)),
        st.tuples(st.integers(1, 5), st.integers(1, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20)),
    ),
    dtype=st.sampled_from(["f2", "f4", "f8", "c8", "c16"]),
    seed=st.integers(0, 2**32),
)
def test_fft_agrees_with_scipy(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    """Every length, odd and even and prime, every dtype, with axes before it, has SciPy's spectrum."""
    x = random_signal(seed, shape, dtype)
    spectrum = fft(x)
    double = dtype in ("f8", "c16")
    assert spectrum.shape == shape
    assert spectrum.dtype == (np.complex128 if double else np.complex64)
    expected = scipy.fft.fft(x.astype(np.complex128))
    tolerance = 1e-12 if double else 1e-5
    np.testing.assert_allclose(spectrum, expected, rtol=tolerance, atol=tolerance * x.shape[-1])


@pytest.mark.parametrize("dtype", ["f8", "c16"])
def test_fft_is_the_sum_that_defines_it(dtype: str) -> None:
    """A spectrum is the signal times the matrix of the roots of unity."""
    x = random_signal(7, (33,), dtype)
    n = np.arange(33)
    np.testing.assert_allclose(fft(x), np.exp(-2j * np.pi * np.outer(n, n) / 33) @ x, atol=1e-12)


@pytest.mark.parametrize("dtype", ["f4", "c16"])
def test_fft_of_many_blocks_agrees_with_scipy(dtype: str) -> None:
    """Rows that don't fit one block, and a row that is longer than one, are transformed whole."""
    for shape in [(1000, 100), (2, 40_009)]:
        x = random_signal(3, shape, dtype)
        expected = scipy.fft.fft(x.astype(np.complex128))
        np.testing.assert_allclose(fft(x), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (0, 0, 4)])
def test_fft_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    """An empty array has an empty spectrum of its shape."""
    assert fft(np.zeros(shape)).shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16"])
def test_fft_of_a_row_that_is_not_finite_spoils_that_row_only(dtype: str, value: float) -> None:
    """A NaN in one row of a batch leaves the others alone."""
    x = np.ones((3, 8), dtype)
    x[1, 4] = value
    finite = np.isfinite(fft(x))
    assert finite[[0, 2]].all()
    assert not finite[1].any()
