"""Tables: rows are observations, columns are variables."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer, Real

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import column_means, working_dtype
from unlatch.compute.kernels.refusals import require_at_least, require_result_bytes

# If the range of keys is at most this many times the number of rows, counting in an array is faster than sorting.
_DENSE_KEYS_PER_ROW = 4


class Groups(NamedTuple):
    """A row for each key that occurs, in ascending order."""

    keys: Integer[np.ndarray, "groups"]
    counts: Int64[np.ndarray, "groups"]
    sum: Float64[np.ndarray, "groups *columns"]
    mean: Float64[np.ndarray, "groups *columns"]
    min: Float64[np.ndarray, "groups *columns"]
    max: Float64[np.ndarray, "groups *columns"]


@kernel(pure=True)
def quantile(x: Real[np.ndarray, "rows *columns"], q: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k *columns"]:
    """Compute the quantiles of every column, by linear interpolation between its sorted values.

    `x` has shape (rows,) or (rows, columns, …), `q` (k,) with numbers from 0 to 1, in any order; the result has shape
    (k,) or (k, columns, …). It is float64, or float32 for float32 and float16. A NaN in a column gives NaN for its
    quantiles. Integers beyond 2**53 are rounded.

    Raises `KernelError` for an `x` without rows, for a q outside 0 to 1, and when the result would be larger than 64
    MiB and than 16 times its arguments. Source: R. Hyndman and Y. Fan, "Sample Quantiles in Statistical Packages", The
    American Statistician 50 (1996), definition 7 (`numpy.quantile`).
    """
    wrong = np.flatnonzero(~((q >= 0) & (q <= 1)))
    if len(wrong):
        raise KernelError(f"q: wanted numbers from 0 to 1, got {q[wrong[0]]} at [{wrong[0]}]")
    if len(x) == 0:
        raise KernelError("x: wanted at least one row, got none")
    dtype = working_dtype(x)
    shape = (len(q), *x.shape[1:])
    require_result_bytes("q", shape, dtype, x.nbytes + q.nbytes)
    if x.size == 0 or len(q) == 0:
        return np.empty(shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        columns = np.array(np.moveaxis(x, 0, -1), dtype, order="C")
        return np.asarray(np.quantile(columns, q.astype(dtype, copy=False), axis=-1, overwrite_input=True), dtype)


@kernel(pure=True)
def covariance(x: Real[np.ndarray, "rows columns"], *, ddof: int = 1) -> Float[np.ndarray, "columns columns"]:
    """Compute the covariance matrix of a table's columns.

    `x` has shape (rows, columns), the result (columns, columns); it is float64, or float32 for float32 and float16.
    Sums of products are divided by rows - `ddof`. A NaN or an infinity gives NaN in its column's covariances.

    Raises `KernelError` for no more than `ddof` rows, for a negative ddof, and when the result would be larger than 64
    MiB and than 16 times `x`. Source: `numpy.cov`.
    """
    require_at_least("ddof", ddof, 0)
    return _covariance(x, ddof)


@kernel(pure=True)
def correlation(x: Real[np.ndarray, "rows columns"]) -> Float[np.ndarray, "columns columns"]:
    """Compute the Pearson correlations of a table's columns, from -1 to 1.

    `x` has shape (rows, columns), the result (columns, columns); it is float64, or float32 for float32 and float16. A
    column that does not vary, or holds a NaN or an infinity, has no correlation: NaN, also with itself.

    Raises `KernelError` for fewer than two rows, and when the result would be larger than 64 MiB and than 16 times
    `x`. Source: `numpy.corrcoef`.
    """
    together = _covariance(x, 1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        deviations = np.sqrt(np.diagonal(together)).copy()
        deviations[deviations == 0] = np.nan
        together /= deviations[:, np.newaxis]
        together /= deviations
    return np.clip(together, -1, 1, out=together)


@kernel(pure=True)
def group_by(keys: Integer[np.ndarray, "rows"], values: Real[np.ndarray, "rows *columns"]) -> Groups:
    """Aggregate the rows that share a key: count, sum, mean, minimum and maximum.

    `keys` has shape (rows,), `values` (rows,) or (rows, columns, …). `keys` of the result holds those that occur,
    ascending, in their dtype; `counts` has their shape; `sum`, `mean`, `min` and `max` have one row for each. All are
    float64: integers beyond 2**53 are rounded. A NaN gives NaN in its group's sum, mean, minimum and maximum, in its
    column.

    Nothing is raised: work and memory follow the rows. Source: the aggregates of SQL's GROUP BY (`scipy.ndimage`'s
    `sum_labels`, `mean`, `minimum` and `maximum`).
    """
    present, group, count = _groups(keys)
    shape = (len(present), *values.shape[1:])
    table = values.reshape(len(values), int(np.prod(shape[1:], dtype=np.int64)))
    total, least, most = (np.empty((len(present), table.shape[1])) for _ in range(3))
    if table.shape[1] > len(table):
        _aggregate_rows(table, group, total, least, most)
    else:
        for column in range(table.shape[1]):
            _aggregate(table[:, column].astype(np.float64), group, total[:, column], least[:, column], most[:, column])
    mean = total / count[:, np.newaxis]
    return Groups(present, count, *(part.reshape(shape) for part in (total, mean, least, most)))


def _covariance(x: np.ndarray, ddof: int) -> np.ndarray:
    dtype = working_dtype(x)
    if len(x) <= ddof:
        raise KernelError(f"x: wanted more than {ddof} rows, got {len(x)}")
    require_result_bytes("x", (x.shape[1], x.shape[1]), dtype, x.nbytes)
    with np.errstate(over="ignore", invalid="ignore"):
        deviations = x.astype(dtype, copy=False)
        deviations = deviations - column_means(deviations)
        together: np.ndarray = deviations.T @ deviations
        together /= dtype.type(len(x) - ddof)
    return together


def _groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray[Any, np.dtype[np.int64]]]:
    """The keys that occur, the number of each row's key among them, and the occurrences of each."""
    if len(keys) == 0:
        return keys, np.empty(0, np.intp), np.empty(0, np.int64)
    least, most = int(keys.min()), int(keys.max())
    if most - least >= _DENSE_KEYS_PER_ROW * len(keys):
        present, group, count = np.unique(keys, return_inverse=True, return_counts=True)
        return present, group, count.astype(np.int64)
    # Differences of unsigned numbers wrap around to the right number, for any dtype.
    place = (
        (keys.astype(np.int64) - np.int64(least))
        if keys.dtype != np.uint64
        else (keys - np.uint64(least)).astype(np.int64)
    )
    occurrences = np.bincount(place)
    occurs = np.flatnonzero(occurrences)
    if len(occurs) < len(occurrences):
        number = np.cumsum(occurrences > 0) - 1
        place = number[place]
    present = (occurs.astype(keys.dtype) + keys.dtype.type(least)).astype(keys.dtype)
    return present, place, occurrences[occurs].astype(np.int64)


def _aggregate_rows(
    table: np.ndarray, group: np.ndarray, total: np.ndarray, least: np.ndarray, most: np.ndarray
) -> None:
    """Aggregate all columns at once, for tables with many columns."""
    total[...], least[...], most[...] = 0, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        for row, own in zip(table, group, strict=True):
            total[own] += row
            np.minimum(least[own], row, out=least[own])
            np.maximum(most[own], row, out=most[own])


def _aggregate(column: np.ndarray, group: np.ndarray, total: np.ndarray, least: np.ndarray, most: np.ndarray) -> None:
    total[...] = np.bincount(group, weights=column, minlength=len(total))
    least[...], most[...] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        np.minimum.at(least, group, column)
        np.maximum.at(most, group, column)
