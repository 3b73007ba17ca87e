"""`fft` and `convolve` against SciPy's, and against their definitions as sums."""

from typing import Any, Literal

import numpy as np
import pytest
import scipy.fft
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.signals import convolve, fft

MODES: dict[str, Literal["full", "same", "valid"]] = {"full": "full", "same": "same", "valid": "valid"}


def random_signal(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Make a read-only array of normal noise, complex noise for a complex dtype."""
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
    """Even, odd and prime lengths, every dtype, with axes before the last, give SciPy's spectrum."""
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
    """Rows that do not fit one block, and a row longer than a block, are transformed whole."""
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
    """A NaN in one row of a batch does not affect the other rows."""
    x = np.ones((3, 8), dtype)
    x[1, 4] = value
    finite = np.isfinite(fft(x))
    assert finite[[0, 2]].all()
    assert not finite[1].any()


@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    n=st.sampled_from([1, 2, 7, 64, 300, 1500]),
    m=st.sampled_from([1, 2, 5, 63, 70, 140, 300]),
    dtypes=st.sampled_from([("f2", "f2"), ("f4", "f4"), ("f8", "f4"), ("f8", "f8"), ("c8", "f4"), ("f8", "c16")]),
    mode=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 2**32),
)
def test_convolve_agrees_with_scipy(
    batch: tuple[int, ...], n: int, m: int, dtypes: tuple[str, str], mode: str, seed: int
) -> None:
    """Sums and transforms, one block and many, rows longer and shorter than the taps agree, in every mode."""
    if mode == "valid" and m > n:
        n, m = m, n
    x, taps = random_signal(seed, (*batch, n), dtypes[0]), random_signal(seed + 1, (m,), dtypes[1])
    convolved = convolve(x, taps, mode=mode)
    common = np.result_type(x, taps)
    assert convolved.dtype == (np.float32 if common == np.float16 else common)
    rows = x.reshape(-1, n).astype(np.complex128)
    wide_taps = taps.astype(np.complex128)
    expected = np.array([scipy.signal.convolve(row, wide_taps, MODES[mode], "direct") for row in rows])
    assert convolved.shape == (*batch, expected.shape[1])
    tolerance = 1e-12 if np.finfo(common).eps < 1e-10 else 1e-5
    np.testing.assert_allclose(convolved.reshape(expected.shape), expected, atol=tolerance * 10 * min(n, m))


@pytest.mark.parametrize("m", [3, 200])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_convolve_of_what_is_not_finite_spoils_what_it_reaches_only(m: int, value: float) -> None:
    """A NaN affects as many samples as there are taps, by sums and by transforms."""
    x, taps = random_signal(5, (2, 2000), "f8"), random_signal(6, (m,), "f8")
    spoiled = np.array(x)
    spoiled[1, 700] = value
    expected = np.array([np.convolve(row, taps) for row in x])
    expected[1, 700 : 700 + m] = np.nan
    np.testing.assert_allclose(convolve(spoiled, taps), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("x", "taps", "mode", "shape"),
    [
        ((0,), (3,), "full", (2,)),
        ((5,), (0,), "full", (4,)),
        ((0,), (0,), "full", (0,)),
        ((2, 5), (0,), "same", (2, 5)),
        ((0, 5), (3,), "valid", (0, 3)),
        ((5,), (0,), "valid", (5,)),
    ],
)
def test_convolve_of_nothing_is_zeros(x: tuple[int, ...], taps: tuple[int], mode: str, shape: tuple[int, ...]) -> None:
    """Without samples, rows or taps the sum is zero."""
    convolved = convolve(np.ones(x), np.ones(taps), mode=mode)
    assert convolved.shape == shape
    assert not convolved.any()


@pytest.mark.parametrize(
    ("x", "taps", "mode", "message"),
    [
        (np.ones(3), np.ones(2), "half", 'mode: wanted "full" or "same" or "valid", got "half"'),
        (np.ones(3), np.ones(4), "valid", "taps: wanted at most the 3 samples of x with mode valid, got 4"),
        (np.ones(3), np.array([1, np.nan]), "full", r"taps: wanted finite elements, got nan at \[1\]"),
        (np.ones((10**4, 1)), np.ones(10**4), "full", "x, taps: wanted a result of at most 67108864 bytes"),
    ],
)
def test_convolve_refuses_what_it_cannot_do(
    x: np.ndarray[Any, Any], taps: np.ndarray[Any, Any], mode: str, message: str
) -> None:
    """Unknown modes, unusable taps and results out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        convolve(x, taps, mode=mode)
