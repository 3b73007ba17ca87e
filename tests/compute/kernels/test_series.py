"""`rolling` against every window by itself."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.series import Rolling, rolling


def one_by_one(x: np.ndarray, window: int, ddof: int) -> Rolling:
    """Compute each window's figures, in double precision."""
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), window, axis=-1)
    return Rolling(windows.mean(-1), windows.std(-1, ddof=ddof), windows.min(-1), windows.max(-1))


@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    n=st.integers(1, 80),
    window=st.integers(1, 80),
    ddof=st.sampled_from([0, 1]),
    dtype=st.sampled_from(["i2", "u1", "i8", "f2", "f4", "f8"]),
    seed=st.integers(0, 2**32),
)
def test_rolling_agrees_with_each_window(
    batch: tuple[int, ...], n: int, window: int, ddof: int, dtype: str, seed: int
) -> None:
    """Every window that fits agrees, in every dtype and any batch."""
    window, ddof = min(window, n), min(ddof, min(window, n) - 1)
    x = np.random.default_rng(seed).uniform(0, 100, (*batch, n)).astype(dtype)
    x.setflags(write=False)
    rolled = rolling(x, window=window, ddof=ddof)
    assert {part.dtype for part in rolled} == {np.dtype(np.float32 if dtype in ("f2", "f4") else np.float64)}
    for part, expected in zip(rolled, one_by_one(x, window, ddof), strict=True):
        assert part.shape == (*batch, n - window + 1)
        np.testing.assert_allclose(part, expected, rtol=1e-5 if part.dtype == np.float32 else 1e-10, atol=1e-9)


@pytest.mark.parametrize("window", [3, 64, 100, 8192, 9000, 19_999])
def test_rolling_over_many_stretches_has_no_seams(window: int) -> None:
    """A series longer than the caches has no seams, with windows shorter and longer than a stretch."""
    x = np.random.default_rng(1).standard_normal(20_000)
    for part, expected in zip(rolling(x, window=window), one_by_one(x, window, 0), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-9, atol=1e-12)


def test_rolling_far_from_zero_keeps_its_digits() -> None:
    """Differences of ones on top of 1e9 are exact, also after a jump of as much."""
    x = np.concatenate([np.zeros(500), 1e9 + np.tile([0.0, 1.0], 500)])
    np.testing.assert_allclose(rolling(x, window=10).std[500:], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(rolling(x, window=10).std[:490], 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_windows_only(value: float) -> None:
    """Windows before and after a NaN or an infinity are computed as usual. An infinity still has an order."""
    x = np.random.default_rng(1).standard_normal(50)
    clean = rolling(x, window=7)
    x[20] = value
    rolled = rolling(x, window=7)
    held = np.zeros(44, bool)
    held[14:21] = True
    for part, expected in zip(rolled, clean, strict=True):
        np.testing.assert_array_equal(part[~held], expected[~held])
    assert not np.isfinite(rolled.mean[held]).any()
    assert np.isnan(rolled.std[held]).all()
    if np.isinf(value):
        assert (rolled.max[held] == np.inf).all() == (value > 0)
        assert (rolled.min[held] == -np.inf).all() == (value < 0)
    else:
        assert np.isnan(rolled.max[held]).all()
        assert np.isnan(rolled.min[held]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window: wanted 1 to the 5 samples of x, got 0"),
        ({"window": 6}, "window: wanted 1 to the 5 samples of x, got 6"),
        ({"window": 3, "ddof": 3}, "ddof: wanted 0 to 2, below the window, got 3"),
        ({"window": 3, "ddof": -1}, "ddof: wanted 0 to 2, below the window, got -1"),
    ],
)
def test_rolling_refuses_windows_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    """A window longer than the series, or shorter than what it is divided by, is refused."""
    with pytest.raises(KernelError, match=message):
        rolling(np.ones(5), **arguments)
