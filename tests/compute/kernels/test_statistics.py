"""`histogram` against NumPy's, and against values placed one by one."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.statistics import histogram


def counted_one_by_one(x: np.ndarray, edges: np.ndarray) -> list[int]:
    """Count the values between each two edges by searching for each value's place."""
    inside = [float(value) for value in x.reshape(-1) if edges[0] <= value <= edges[-1]]
    places = [min(int(np.searchsorted(edges, value, side="right")) - 1, len(edges) - 2) for value in inside]
    return [places.count(place) for place in range(len(edges) - 1)]


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), max_size=60),
    bins=st.integers(1, 20),
    low=st.floats(-1e3, 0) | st.just(math.nan),
    high=st.floats(0.5, 1e3) | st.just(math.nan),
    dtype=st.sampled_from(["f4", "f8"]),
)
def test_histogram_places_each_value(values: list[float], bins: int, low: float, high: float, dtype: str) -> None:
    """Every value inside is counted between its two edges, whichever bounds of the interval are given."""
    x = np.array(values, dtype)
    counts, edges = histogram(x, bins=bins, low=low, high=high)
    assert counts.dtype == np.int64
    assert edges.dtype == np.float64
    assert counts.tolist() == counted_one_by_one(x, edges)
    assert math.isnan(low) or edges[0] == low or edges[0] == low - 0.5
    assert math.isnan(high) or edges[-1] == high or edges[-1] == high + 0.5


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "u8", "f2", "f4", "f8"])
@pytest.mark.parametrize("size", [0, 7, 100_000])
def test_histogram_agrees_with_numpy(dtype: str, size: int) -> None:
    """Every real dtype, with few values and many, has NumPy's counts over the data's own interval."""
    x = (np.random.default_rng(4).standard_normal(size) * 30).clip(-100, 100)
    x = (abs(x) if np.dtype(dtype).kind == "u" else x).astype(dtype)
    x.setflags(write=False)
    counts, edges = histogram(x, bins=37)
    expected_counts, expected_edges = np.histogram(x.astype(np.float64), bins=37)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(edges, expected_edges, rtol=1e-15)


def test_histogram_of_many_blocks_counts_every_value() -> None:
    """More values than one block are all counted, in any shape."""
    x = np.random.default_rng(9).random((1500, 1001))
    np.testing.assert_array_equal(histogram(x, bins=64, low=0, high=1).counts, np.histogram(x, 64, (0, 1))[0])
    bytes_ = (x * 256).astype(np.uint8)
    np.testing.assert_array_equal(histogram(bytes_, bins=256, low=0, high=256).counts, np.bincount(bytes_.reshape(-1)))


@pytest.mark.parametrize(
    ("x", "interval"),
    [
        (np.array([]), (0, 1)),
        (np.array([np.nan, np.inf]), (0, 1)),
        (np.array([np.nan, -np.inf, 2, 5, np.inf]), (2, 5)),
        (np.array(3), (2.5, 3.5)),
        (np.array([7, 7, 7]), (6.5, 7.5)),
        (np.array([True, True]).view(np.int8), (0.5, 1.5)),
    ],
)
def test_histogram_takes_its_interval_from_finite_values(
    x: np.ndarray[Any, Any], interval: tuple[float, float]
) -> None:
    """NaN, infinities, no values and equal values all give a sensible interval."""
    counts, edges = histogram(x, bins=4)
    assert (edges[0], edges[-1]) == interval
    assert counts.sum() == np.isfinite(x).sum()


@pytest.mark.parametrize(("low", "high", "interval"), [(9, math.nan, (8.5, 9.5)), (math.nan, -9, (-9.5, -8.5))])
def test_histogram_keeps_a_given_bound_beyond_the_data(low: float, high: float, interval: tuple[float, float]) -> None:
    """Data beyond the one bound that is given is not counted."""
    counts, edges = histogram(np.arange(5), low=low, high=high)
    assert (edges[0], edges[-1]) == interval
    assert not counts.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 0}, "bins: wanted 1 to 65536, got 0"),
        ({"bins": 65_537}, "bins: wanted 1 to 65536, got 65537"),
        ({"low": math.inf}, "low: wanted a finite number, .* got inf"),
        ({"high": -math.inf}, "high: wanted a finite number, .* got -inf"),
        ({"low": 2.0, "high": 1.0}, "low: wanted at most high, which is 1.0, got 2.0"),
        ({"low": -1.7e308, "high": 1.7e308}, "high: wanted an interval whose width float64 can hold"),
        ({"low": 1e300, "high": 1e300}, "bins: wanted no more than float64 can tell apart between"),
        ({"low": 1.0, "high": 1.0 + 1e-15, "bins": 100}, "bins: wanted no more than float64 can tell apart between"),
    ],
)
def test_histogram_refuses_what_it_cannot_bin(arguments: dict[str, Any], message: str) -> None:
    """Bins and intervals that are out of proportion or impossible are refused by name."""
    with pytest.raises(KernelError, match=message):
        histogram(np.ones(3), **arguments)
