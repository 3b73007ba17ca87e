"""Quantiles, covariances and groups against NumPy's, and against plain Python."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.tables import correlation, covariance, group_by, quantile

REAL_DTYPES = ["i1", "u2", "i8", "f2", "f4", "f8"]


def random_table(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """Make a read-only table of values from 0 to 100."""
    table = np.random.default_rng(seed).uniform(0, 100, shape).astype(dtype)
    table.setflags(write=False)
    return table


def result_dtype(dtype: str) -> type[np.floating[Any]]:
    return np.float32 if dtype in ("f2", "f4") else np.float64


@given(
    rows=st.integers(1, 60),
    columns=st.sampled_from([(), (1,), (4,), (2, 3), (0,)]),
    q=st.lists(st.floats(0, 1), max_size=6),
    dtype=st.sampled_from(REAL_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_quantile_agrees_with_numpy(rows: int, columns: tuple[int, ...], q: list[float], dtype: str, seed: int) -> None:
    """Any number of columns and quantiles agrees, also none."""
    x = random_table(seed, (rows, *columns), dtype)
    found = quantile(x, np.array(q))
    assert found.dtype == result_dtype(dtype)
    assert found.shape == (len(q), *columns)
    if found.size:
        expected = np.quantile(x.astype(np.float64), q, axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5 if found.dtype == np.float32 else 1e-12, atol=1e-4)


def test_quartiles_are_pythons() -> None:
    """The standard library's inclusive method has the same definition."""
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    expected = statistics.quantiles(values, n=4, method="inclusive")
    np.testing.assert_allclose(quantile(np.array(values), np.array([0.25, 0.5, 0.75])), expected)


def test_quantiles_of_a_column_with_a_nan_are_nan() -> None:
    """The other columns are computed as usual."""
    x = np.arange(20.0).reshape(10, 2)
    x[3, 1] = np.nan
    found = quantile(x, np.array([0.0, 1.0]))
    np.testing.assert_array_equal(found, [[0, np.nan], [18, np.nan]])


@given(
    rows=st.integers(2, 40),
    columns=st.integers(0, 6),
    ddof=st.sampled_from([0, 1]),
    dtype=st.sampled_from(REAL_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_covariance_agrees_with_numpy(rows: int, columns: int, ddof: int, dtype: str, seed: int) -> None:
    """Every dtype agrees, in the documented precision."""
    x = random_table(seed, (rows, columns), dtype)
    together = covariance(x, ddof=ddof)
    assert together.dtype == result_dtype(dtype)
    wide = x.astype(np.float64)
    expected = np.cov(wide, rowvar=False, ddof=ddof).reshape(columns, columns) if columns else np.empty((0, 0))
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-2 if together.dtype == np.float32 else 1e-9)
    if columns and (expected.diagonal() > 1e-6).all():
        np.testing.assert_allclose(correlation(x), np.corrcoef(wide, rowvar=False).reshape(columns, columns), atol=1e-3)


def test_correlation_of_what_does_not_vary_is_unknown() -> None:
    """A flat column, and a column with a NaN, have no correlation. The others have theirs, and 1 with themselves."""
    x = np.array([[1.0, 5.0, 2.0, 0.0], [2.0, 5.0, 4.0, np.nan], [3.0, 5.0, 6.0, 1.0]])
    known = np.array([True, False, True, False])
    together = correlation(x)
    assert np.isnan(together[~known]).all()
    assert np.isnan(together[:, ~known]).all()
    np.testing.assert_allclose(together[np.ix_(known, known)], 1)
    assert together.max(initial=-1, where=~np.isnan(together)) <= 1


def test_covariance_far_from_zero_keeps_its_digits() -> None:
    """Values around 1e12 that differ by ones keep their covariance."""
    x = 1e12 + np.array([[0.0], [1.0], [2.0], [3.0]])
    np.testing.assert_allclose(covariance(x), [[5 / 3]], rtol=1e-6)


@given(
    keys=st.lists(st.integers(-5, 5) | st.sampled_from([-(2**63), 2**63 - 1, 10**9]), max_size=40),
    columns=st.sampled_from([(), (1,), (2, 2), (0,), (50,)]),
    dtype=st.sampled_from(REAL_DTYPES),
    seed=st.integers(0, 2**32),
)
def test_group_by_agrees_with_plain_python(keys: list[int], columns: tuple[int, ...], dtype: str, seed: int) -> None:
    """Dense keys and keys far apart, no rows, no columns: the result is that of a dictionary of lists."""
    values = random_table(seed, (len(keys), *columns), dtype)
    groups = group_by(np.array(keys, np.int64), values)
    assert groups.keys.tolist() == sorted(set(keys))
    assert groups.counts.tolist() == [keys.count(key) for key in sorted(set(keys))]
    assert groups.sum.shape == (len(set(keys)), *columns)
    wide = values.astype(np.float64)
    for index, key in enumerate(sorted(set(keys))):
        own = wide[[row for row, other in enumerate(keys) if other == key]]
        np.testing.assert_allclose(groups.sum[index], own.sum(axis=0), rtol=1e-12)
        np.testing.assert_allclose(groups.mean[index], own.mean(axis=0), rtol=1e-12)
        np.testing.assert_array_equal(groups.min[index], own.min(axis=0))
        np.testing.assert_array_equal(groups.max[index], own.max(axis=0))


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u4", "u8"])
def test_group_by_keeps_the_dtype_of_its_keys(dtype: str) -> None:
    """Keys at both ends of their dtype's range keep it, close together and far apart."""
    limits = np.iinfo(dtype)
    for keys in ([limits.max, limits.max - 1] * 3, [limits.min, limits.max, limits.min]):
        array = np.array(keys, dtype)
        groups = group_by(array, np.ones(len(keys)))
        assert groups.keys.dtype == array.dtype
        assert groups.keys.tolist() == sorted(set(keys))
        assert groups.counts.tolist() == groups.sum.tolist() == [keys.count(key) for key in sorted(set(keys))]


def test_a_nan_spoils_its_group_only() -> None:
    """Only the NaN's own group and column are NaN."""
    groups = group_by(np.array([1, 2, 1]), np.array([[1.0, 1.0], [2.0, np.nan], [3.0, 3.0]]))
    for part, expected in ((groups.sum, [4, 4]), (groups.mean, [2, 2]), (groups.min, [1, 1]), (groups.max, [3, 3])):
        np.testing.assert_array_equal(part, [expected, [2, np.nan]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantile(np.ones(3), np.array([0.5, 1.5])), r"q: wanted numbers from 0 to 1, got 1.5 at \[1\]"),
        (lambda: quantile(np.ones(3), np.array([np.nan])), r"q: wanted numbers from 0 to 1, got nan at \[0\]"),
        (lambda: quantile(np.zeros((0, 3)), np.array([0.5])), "x: wanted at least one row, got none"),
        (lambda: quantile(np.ones((1, 10**4)), np.zeros(10**4)), "q: wanted a result of at most 67108864 bytes"),
        (lambda: covariance(np.ones((1, 3))), "x: wanted more than 1 rows, got 1"),
        (lambda: covariance(np.ones((3, 3)), ddof=3), "x: wanted more than 3 rows, got 3"),
        (lambda: covariance(np.ones((3, 3)), ddof=-1), "ddof: wanted a finite number of at least 0, got -1"),
        (lambda: covariance(np.ones((2, 10**4))), "x: wanted a result of at most 67108864 bytes"),
        (lambda: correlation(np.ones((1, 3))), "x: wanted more than 1 rows, got 1"),
    ],
)
def test_tables_refuse_what_says_nothing(call: Callable[[], object], message: str) -> None:
    """Too few rows, impossible quantiles and results out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        call()
