"""Structure in the rows of a table: clusters and principal components."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int32, Int64

from unlatch import KernelError, kernel
from unlatch.compute.kernels.precision import column_means, working_dtype
from unlatch.compute.kernels.refusals import require_at_least, require_between, require_finite, require_work

# Maximum multiplications. Finding the nearest center counts as some more. The limit is about a minute.
_MAX_DISTANCE_WORK = 200_000_000_000
_WORK_PER_DISTANCE = 16

# Distances are computed for blocks of rows that hold about this many, to stay in the cache of one core.
_BLOCK_DISTANCES = 32_768

# The work grows with the cube of this: about a minute on one core.
_MAX_SVD_SIDE = 4096

# A table this many times taller than wide is decomposed by its covariances, which are far fewer.
_TALL = 10


class Clusters(NamedTuple):
    """The clusters' centers, each row's cluster, the sum of squared distances, and how many times centers moved."""

    centers: Float[np.ndarray, "k columns"]
    labels: Int32[np.ndarray, "rows"]
    inertia: Float64[np.ndarray, ""]
    iterations: Int64[np.ndarray, ""]


class PrincipalComponents(NamedTuple):
    """Directions in which rows vary, the variance and its share along each, the rows' coordinates, and the mean."""

    components: Float[np.ndarray, "k columns"]
    variance: Float[np.ndarray, "k"]
    share: Float[np.ndarray, "k"]
    scores: Float[np.ndarray, "rows k"]
    mean: Float[np.ndarray, "columns"]


@kernel(pure=True)
def kmeans(
    x: Float[np.ndarray, "rows columns"],
    *,
    clusters: int,
    seed: int = 0,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> Clusters:
    """Group the rows of a table into clusters around their means: k-means, seeded.

    `x` has shape (rows, columns). `centers` is (clusters, columns) in `x`'s dtype (float16 gives float32), `labels`
    (rows,), `inertia` and `iterations` single numbers. The first centers are drawn by k-means++, each the best of
    2 + log(clusters) tries. Then rows are assigned to the nearest center, and centers move to their rows' mean, until
    no row changes, or centers move by less than `tolerance` times the columns' mean variance (squared), or
    `max_iterations` is reached. A center without rows takes the row that is farthest from its own center. The same
    arguments and `seed` give the same result: `numpy.random.Generator(PCG64(seed))`.

    Raises `KernelError` for elements that are not finite, for clusters outside 1 to the number of rows, for a negative
    seed or tolerance, for max_iterations below 1, and for rows x clusters x (columns + 16) x passes above 2 * 10**11,
    where passes are max_iterations and the tries. Source: D. Arthur and S. Vassilvitskii, "k-means++: The Advantages of
    Careful Seeding", SODA 2007 (`sklearn.cluster.KMeans` with `n_init=1`).
    """
    rows, columns = x.shape
    require_between("clusters", clusters, 1, rows)
    require_at_least("seed", seed, 0)
    require_at_least("tolerance", tolerance, 0)
    require_at_least("max_iterations", max_iterations, 1)
    passes = max_iterations + _tries(clusters)
    work = rows * clusters * (columns + _WORK_PER_DISTANCE) * passes
    require_work("clusters, max_iterations", "rows x clusters x (columns + 16) x passes", work, _MAX_DISTANCE_WORK)
    require_finite("x", x)
    points = x.astype(working_dtype(x), copy=False)
    mean = column_means(points)
    # Relative to their mean: distances are differences of squares, which would cancel far from the origin.
    points = points - mean
    squares = np.einsum("ij,ij->i", points, points)
    still = tolerance * float(points.var(axis=0).mean()) if columns else 0.0
    centers = _first_centers(points, squares, clusters, np.random.Generator(np.random.PCG64(seed)))
    labels = np.full(rows, -1, np.int32)
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        before, previous = labels, centers
        labels, distances, sums, counts = _assigned(points, squares, centers)
        centers = _moved(points, labels, distances, sums, counts)
        if np.array_equal(labels, before) or float(((centers - previous) ** 2).sum()) <= still:
            break
    labels, distances, _, _ = _assigned(points, squares, centers)
    inertia = np.asarray(distances.sum(dtype=np.float64))
    return Clusters(centers + mean, labels, inertia, np.asarray(iterations, np.int64))


@kernel(pure=True)
def pca(x: Float[np.ndarray, "rows columns"], *, components: int) -> PrincipalComponents:
    """Find the directions in which the rows of a table vary most: principal components.

    `x` has shape (rows, columns). `components` of the result is (components, columns), orthonormal, the largest
    variance first, each with its largest element positive; `variance` (over rows - 1) and `share` (of all variance)
    have shape (components,), `scores` (rows, components), `mean` (columns,). All have `x`'s dtype; float16 gives
    float32. Without any variance, shares are NaN.

    Raises `KernelError` for elements that are not finite, for fewer than two rows, for components outside 1 to the
    shorter side, and for a shorter side above 4096. Source: I. Jolliffe, "Principal Component Analysis"
    (`sklearn.decomposition.PCA`).
    """
    if len(x) < 2:
        raise KernelError(f"x: wanted at least 2 rows, got {len(x)}")
    require_between("components", components, 1, min(x.shape))
    require_work("x", "a shorter side", min(x.shape), _MAX_SVD_SIDE)
    require_finite("x", x)
    table = x.astype(working_dtype(x), copy=False)
    mean = column_means(table)
    centered = table - mean
    try:
        variances, directions = _directions(centered)
    except np.linalg.LinAlgError as error:
        raise KernelError(f"x: wanted a table whose decomposition converges, got {error}") from error
    chosen = directions[:components]
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=1, keepdims=True), axis=1)
    chosen = np.where(largest < 0, -chosen, chosen)
    with np.errstate(invalid="ignore"):
        share = variances[:components] / variances.sum()
    return PrincipalComponents(chosen, variances[:components], share, centered @ chosen.T, mean)


def _tries(clusters: int) -> int:
    return 2 + int(math.log(clusters))


def _first_centers(points: np.ndarray, squares: np.ndarray, clusters: int, draws: np.random.Generator) -> np.ndarray:
    """k-means++: draw rows in proportion to their squared distance from the centers chosen so far."""
    tries = _tries(clusters)
    chosen = [int(draws.integers(len(points)))]
    nearest = _distances(points, squares, chosen)[0]
    for _ in range(1, clusters):
        until = np.cumsum(nearest, dtype=np.float64)
        places = np.searchsorted(until, draws.random(tries) * until[-1], side="right")
        candidates = np.minimum(places, len(points) - 1)
        reduced = np.minimum(_distances(points, squares, candidates), nearest)
        best = int(reduced.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(candidates[best]))
        nearest = reduced[best]
    return points[chosen]


def _distances(points: np.ndarray, squares: np.ndarray, chosen: list[int] | np.ndarray) -> np.ndarray:
    """Squared distances of every row from the chosen rows, one row of the result for each chosen row."""
    found = points[chosen] @ points.T
    found *= -2
    found += squares
    found += squares[chosen][:, np.newaxis]
    found[np.arange(len(found)), chosen] = 0
    return np.asarray(np.maximum(found, 0, out=found))


def _blocks(rows: int, clusters: int) -> Iterator[slice]:
    size = max(64, _BLOCK_DISTANCES // clusters)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _assigned(
    points: np.ndarray, squares: np.ndarray, centers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each row's nearest center and squared distance; each center's sum and number of rows."""
    labels, distances = np.empty(len(points), np.int32), np.empty(len(points), points.dtype)
    sums, counts = np.zeros(centers.shape), np.zeros(len(centers), np.int64)
    center_squares = np.einsum("ij,ij->i", centers, centers)[:, np.newaxis]
    numbers = np.arange(len(centers), dtype=points.dtype)
    for block in _blocks(len(points), len(centers)):
        rows = points[block]
        apart = (-2 * centers) @ rows.T
        apart += center_squares
        apart.min(axis=0, out=distances[block])
        # 1 for each row's nearest center, 0 for the others: sums and counts are then matrix products.
        mine = (apart == distances[block]).astype(points.dtype)
        count = mine.sum(axis=1)
        if count.sum() != len(rows):  # a row at equal distance from two centers belongs to the first
            mine = (apart.argmin(axis=0) == numbers[:, np.newaxis]).astype(points.dtype)
            count = mine.sum(axis=1)
        labels[block] = numbers @ mine
        sums += mine @ rows
        counts += count.astype(np.int64)
    distances += squares
    return labels, np.maximum(distances, 0, out=distances), sums, counts


def _moved(
    points: np.ndarray, labels: np.ndarray, distances: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        farthest = np.argpartition(distances, len(distances) - len(empty))[len(distances) - len(empty) :]
        for cluster, row in zip(empty, farthest, strict=True):
            sums[labels[row]] -= points[row]
            counts[labels[row]] -= 1
            sums[cluster], counts[cluster] = points[row], 1
    centers: np.ndarray = sums / np.maximum(counts, 1)[:, np.newaxis]
    return centers.astype(points.dtype)


def _directions(centered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = centered.shape
    if rows >= _TALL * columns:
        variances, vectors = np.linalg.eigh(centered.T @ centered / centered.dtype.type(rows - 1))
        return np.maximum(variances[::-1], 0), vectors.T[::-1]
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    return singular**2 / centered.dtype.type(rows - 1), directions
