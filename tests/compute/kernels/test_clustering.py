"""`kmeans` and `pca` against scikit-learn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from unlatch import KernelError
from unlatch.compute.kernels.clustering import kmeans, pca

Table = np.ndarray[Any, Any]


def blobs(seed: int, rows: int, centers: int, columns: int, dtype: str) -> tuple[Table, Table]:
    """Make points around centers that are far apart, and return each point's center."""
    random = np.random.default_rng(seed)
    middles = 20 * random.permutation(centers)[:, np.newaxis] + random.uniform(0, 1, (centers, columns))
    own = np.concatenate([np.arange(centers), random.integers(0, centers, rows - centers)])
    points = (middles[own] + random.standard_normal((rows, columns))).astype(dtype)
    points.setflags(write=False)
    return points, own


@settings(max_examples=30)
@given(
    clusters=st.integers(1, 8),
    columns=st.integers(1, 5),
    dtype=st.sampled_from(["f2", "f4", "f8"]),
    seed=st.integers(0, 2**32),
)
def test_kmeans_finds_what_lies_apart(clusters: int, columns: int, dtype: str, seed: int) -> None:
    """Blobs that are far apart become the clusters, in any numbering, and centers are their means."""
    x, own = blobs(seed, 400, clusters, columns, dtype)
    found = kmeans(x, clusters=clusters, seed=seed)
    assert found.centers.dtype == (np.float64 if dtype == "f8" else np.float32)
    assert found.labels.dtype == np.int32
    pairs = set(zip(own.tolist(), found.labels.tolist(), strict=True))
    assert len(pairs) == clusters == len({label for _, label in pairs})
    wide = x.astype(np.float64)
    means = np.array([wide[found.labels == label].mean(axis=0) for label in range(clusters)])
    np.testing.assert_allclose(found.centers, means, rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(found.inertia, ((wide - means[found.labels]) ** 2).sum(), rtol=2e-2)


def test_kmeans_ends_where_scikit_learn_stays() -> None:
    """From our centers scikit-learn's iteration finds nothing better, and labels every row as we do."""
    x = np.random.default_rng(3).uniform(size=(2000, 4))
    found = kmeans(x, clusters=12, tolerance=0)
    reference = KMeans(12, init=found.centers, n_init=1, tol=0).fit(x)
    np.testing.assert_allclose(reference.cluster_centers_, found.centers, rtol=1e-9)
    np.testing.assert_array_equal(reference.labels_, found.labels)
    assert reference.inertia_ == pytest.approx(float(found.inertia))


def test_kmeans_is_as_good_as_scikit_learns() -> None:
    """Over many seeds the sums of squares are as small as those from scikit-learn's seeding."""
    x = np.random.default_rng(5).uniform(size=(600, 3))
    ours = [float(kmeans(x, clusters=10, seed=seed).inertia) for seed in range(20)]
    theirs = [KMeans(10, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(20)]
    assert np.mean(ours) < 1.03 * np.mean(theirs)


def test_a_seed_is_a_clustering() -> None:
    """The same seed gives the same bits. Far from the origin no digits are lost."""
    x, _ = blobs(1, 300, 5, 3, "f8")
    first, again = (kmeans(x, clusters=5, seed=4) for _ in range(2))
    assert first.centers.tobytes() == again.centers.tobytes()
    far = kmeans(x + 1e8, clusters=5, seed=4)
    np.testing.assert_array_equal(far.labels, first.labels)
    np.testing.assert_allclose(far.inertia, first.inertia, rtol=1e-5)


def test_kmeans_gives_every_center_rows() -> None:
    """As many clusters as rows leave no distance. With equal rows some centers have no rows."""
    x = np.random.default_rng(2).standard_normal((30, 2))
    every = kmeans(x, clusters=30)
    assert sorted(every.labels.tolist()) == list(range(30))
    np.testing.assert_allclose(every.inertia, 0, atol=1e-12)
    same = kmeans(np.ones((5, 2)), clusters=3)
    np.testing.assert_array_equal(same.centers, 1)
    assert kmeans(np.zeros((4, 0)), clusters=2).centers.shape == (2, 0)
    assert kmeans(x, clusters=3, max_iterations=1).iterations == 1


@given(
    shape=st.sampled_from([(2, 1), (5, 3), (40, 4), (200, 6), (6, 20), (30, 30)]),
    dtype=st.sampled_from(["f2", "f4", "f8"]),
    seed=st.integers(0, 2**32),
)
def test_pca_agrees_with_scikit_learn(shape: tuple[int, int], dtype: str, seed: int) -> None:
    """Tall, wide and square tables: variances, shares, and directions where variances differ."""
    random = np.random.default_rng(seed)
    x = (random.standard_normal(shape) * 2.0 ** -np.arange(shape[1]) + 3).astype(dtype)
    x.setflags(write=False)
    number = min(shape[0] - 1, shape[1], 3)
    found = pca(x, components=number)
    assert {part.dtype for part in found} == {np.dtype(np.float64 if dtype == "f8" else np.float32)}
    wide = x.astype(np.float64)
    reference = PCA(number, svd_solver="full").fit(wide)
    tolerance = 1e-9 if dtype == "f8" else 1e-4
    np.testing.assert_allclose(found.mean, reference.mean_, atol=tolerance)
    np.testing.assert_allclose(found.variance, reference.explained_variance_, rtol=1e-2, atol=tolerance)
    np.testing.assert_allclose(found.share, reference.explained_variance_ratio_, rtol=1e-2, atol=tolerance)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(number), atol=tolerance)
    largest = np.abs(found.components).argmax(axis=1)
    assert (found.components[np.arange(number), largest] > 0).all()
    first = reference.components_[0] * np.sign(reference.components_[0] @ found.components[0])
    if number > 1 and found.variance[1] < 0.7 * found.variance[0]:
        np.testing.assert_allclose(found.components[0], first, atol=1e-8 if dtype == "f8" else 1e-2)
    np.testing.assert_allclose(found.scores, (wide - wide.mean(axis=0)) @ found.components.T, atol=100 * tolerance)


def test_pca_of_what_does_not_vary() -> None:
    """Equal rows have no variance, and no share of it."""
    found = pca(np.ones((4, 2)), components=2)
    assert not found.variance.any()
    assert np.isnan(found.share).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(np.ones((3, 2)), clusters=0), "clusters: wanted 1 to 3, got 0"),
        (lambda: kmeans(np.ones((3, 2)), clusters=4), "clusters: wanted 1 to 3, got 4"),
        (lambda: kmeans(np.ones((3, 2)), clusters=1, seed=-1), "seed: wanted .* at least 0, got -1"),
        (lambda: kmeans(np.ones((3, 2)), clusters=1, tolerance=np.nan), "tolerance: wanted a finite number"),
        (lambda: kmeans(np.ones((3, 2)), clusters=1, max_iterations=0), "max_iterations: wanted .* at least 1"),
        (
            lambda: kmeans(np.ones((10**4, 2)), clusters=10**4),
            "clusters, max_iterations: wanted rows x clusters x .* at most 200000000000, got 559800000000",
        ),
        (lambda: kmeans(np.array([[1.0], [np.nan]]), clusters=1), r"x: wanted finite elements, got nan at \[1, 0\]"),
        (lambda: pca(np.ones((3, 2)), components=0), "components: wanted 1 to 2, got 0"),
        (lambda: pca(np.ones((3, 2)), components=3), "components: wanted 1 to 2, got 3"),
        (lambda: pca(np.ones((1, 2)), components=1), "x: wanted at least 2 rows, got 1"),
        (lambda: pca(np.array([[1.0], [np.inf]]), components=1), "x: wanted finite elements"),
        (
            lambda: pca(np.broadcast_to(1.0, (4097, 4097)), components=1),
            "x: wanted a shorter side of at most 4096, got 4097",
        ),
    ],
)
def test_clustering_refuses_what_it_cannot_part(call: Callable[[], object], message: str) -> None:
    """Impossible numbers, elements that are not finite and work out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        call()
