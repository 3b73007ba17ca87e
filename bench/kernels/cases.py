"""Cases of `bench.kernels`: each built-in kernel with one size of input, and another library that does the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import scipy.integrate
import scipy.interpolate
import scipy.linalg
import scipy.ndimage
import scipy.signal
import scipy.stats
from PIL import Image, ImageOps
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from unlatch.compute.kernels import (
    basics,
    clustering,
    components,
    decompositions,
    dynamics,
    finance,
    images,
    interpolation,
    levels,
    linear_algebra,
    medians,
    morphology,
    resampling,
    resizing,
    series,
    signals,
    statistics,
    tables,
)

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """A kernel with one size of input. `variant` distinguishes further cases of a kernel."""

    kernel: str
    size: str
    ours: Callable[[], object]
    reference: str = ""
    theirs: Callable[[], object] | None = None
    variant: str = ""


def cases() -> list[Case]:
    """Make all cases, which takes a second."""
    random = np.random.default_rng(1)
    return [*_linear(random), *_decompositions(random), *_signals(random), *_pictures(random), *_tables(random)]


def _linear(random: np.random.Generator) -> list[Case]:
    a, b = random.standard_normal((2, 500, 500))
    tall, right = random.standard_normal((1000, 100)), random.standard_normal(1000)
    rates = random.standard_normal((6, 6)) - 4 * np.eye(6)
    force, start = random.standard_normal((2, 6))
    times = np.linspace(0, 2, 1001)
    tiny = np.zeros(128)

    def integrated() -> object:
        return scipy.integrate.solve_ivp(
            lambda _, y: rates @ y + force, (0, 2), start, method="DOP853", rtol=1e-10, t_eval=times
        )

    return [
        Case("identity", "128", lambda: basics.identity(tiny)),
        Case(
            "matmul", "500x500", lambda: linear_algebra.matmul(a, b), "scipy.linalg.blas.dgemm",
            lambda: scipy.linalg.blas.dgemm(1.0, a.T, b.T, trans_a=True, trans_b=True),
        ),
        Case(
            "solve", "500x500, 500", lambda: linear_algebra.solve(a, b[0]), "scipy.linalg.solve",
            lambda: scipy.linalg.solve(a, b[0]),
        ),
        Case(
            "lstsq", "1000x100, 1000", lambda: linear_algebra.lstsq(tall, right), "scipy.linalg.lstsq",
            lambda: scipy.linalg.lstsq(tall, right),
        ),
        Case(
            "pinv", "1000x100", lambda: linear_algebra.pinv(tall), "scipy.linalg.pinv",
            lambda: scipy.linalg.pinv(tall),
        ),
        Case("expm", "500x500", lambda: dynamics.expm(a / 20), "scipy.linalg.expm", lambda: scipy.linalg.expm(a / 20)),
        Case(
            "integrate_linear_ode", "6 states, 1000 steps",
            lambda: dynamics.integrate_linear_ode(rates, force, start, duration=2.0, steps=1000),
            "scipy.integrate.solve_ivp (DOP853)", integrated,
        ),
    ]  # fmt: skip


def _decompositions(random: np.random.Generator) -> list[Case]:
    a = random.standard_normal((300, 300))
    single = a.astype(np.float32)
    symmetric = a @ a.T + np.eye(300)
    return [
        Case("svd", "300x300", lambda: decompositions.svd(a), "scipy.linalg.svd", lambda: scipy.linalg.svd(a)),
        Case(
            "svd", "300x300", lambda: decompositions.svd(single), "scipy.linalg.svd", lambda: scipy.linalg.svd(single),
            variant="float32",
        ),
        Case(
            "eigh", "300x300", lambda: decompositions.eigh(symmetric), "scipy.linalg.eigh",
            lambda: scipy.linalg.eigh(symmetric),
        ),
        Case(
            "qr", "300x300", lambda: decompositions.qr(a), "scipy.linalg.qr",
            lambda: scipy.linalg.qr(a, mode="economic"),
        ),
        Case(
            "cholesky", "300x300", lambda: decompositions.cholesky(symmetric), "scipy.linalg.cholesky",
            lambda: scipy.linalg.cholesky(symmetric, lower=True),
        ),
    ]  # fmt: skip


def _signals(random: np.random.Generator) -> list[Case]:
    rows = random.standard_normal((500, 1024))
    single = rows.astype(np.float32)
    single_complex = single + 1j * single[::-1]
    long, taps = random.standard_normal(500_000), random.standard_normal(101)
    x = np.cumsum(random.uniform(0.5, 1, 10_000))
    y, at = random.standard_normal(10_000), np.sort(random.uniform(x[0], x[-1], 100_000))
    return [
        Case("fft", "500 x 1024", lambda: signals.fft(rows), "scipy.fft.fft", lambda: scipy.fft.fft(rows)),
        Case(
            "fft", "500 x 1024", lambda: signals.fft(single), "scipy.fft.fft", lambda: scipy.fft.fft(single),
            variant="float32",
        ),
        Case(
            "fft", "500 x 1024", lambda: signals.fft(single_complex), "scipy.fft.fft",
            lambda: scipy.fft.fft(single_complex), variant="complex64",
        ),
        Case(
            "convolve", "500,000 with 101 taps", lambda: signals.convolve(long, taps), "scipy.signal.oaconvolve",
            lambda: scipy.signal.oaconvolve(long, taps),
        ),
        Case(
            "interpolate", "10,000 at 100,000", lambda: interpolation.interpolate(x, y, at), "numpy.interp",
            lambda: np.interp(at, x, y),
        ),
        Case(
            "interpolate", "10,000 at 100,000", lambda: interpolation.interpolate(x, y, at, kind="cubic"),
            "scipy.interpolate.CubicSpline", lambda: scipy.interpolate.CubicSpline(x, y)(at), variant="cubic",
        ),
    ]  # fmt: skip


def _pictures(random: np.random.Generator) -> list[Case]:
    rgb = random.integers(0, 256, (512, 512, 3), np.uint8)
    gray = np.ascontiguousarray(rgb[..., 0])
    floats = gray.astype(np.float32)
    picture = Image.fromarray(rgb)
    blobs = scipy.ndimage.gaussian_filter(random.random((1024, 1024)), 3) > 0.5
    noise = random.random((1024, 1024)) > 0.5

    def morphology_case(name: str, function: Callable[..., Array], reference: Callable[..., Array]) -> Case:
        return Case(
            name, "512x512 uint8, 7x7", lambda: function(gray, size=7), f"scipy.ndimage.{reference.__name__}",
            lambda: reference(gray, size=(7, 7)),
        )  # fmt: skip

    def sobel() -> object:
        return np.hypot(scipy.ndimage.sobel(floats, 0), scipy.ndimage.sobel(floats, 1))

    return [
        Case(
            "gaussian_blur", "512x512 float32, sigma 3", lambda: images.gaussian_blur(floats, sigma=3.0),
            "scipy.ndimage.gaussian_filter", lambda: scipy.ndimage.gaussian_filter(floats, 3.0),
        ),
        Case("sobel", "512x512 float32", lambda: images.sobel(floats), "scipy.ndimage.sobel, numpy.hypot", sobel),
        Case(
            "resize", "512x512x3 uint8 to 300x400", lambda: resizing.resize(rgb, height=300, width=400),
            "Pillow, Image.resize", lambda: np.asarray(picture.resize((400, 300), Image.Resampling.BILINEAR)),
        ),
        Case(
            "resize", "512x512x3 uint8 to 300x400",
            lambda: resizing.resize(rgb, height=300, width=400, method="lanczos"),
            "Pillow, Image.resize", lambda: np.asarray(picture.resize((400, 300), Image.Resampling.LANCZOS)),
            variant="lanczos",
        ),
        Case(
            "median_filter", "512x512 uint8, 5x5", lambda: medians.median_filter(gray, size=5),
            "scipy.ndimage.median_filter", lambda: scipy.ndimage.median_filter(gray, size=5),
        ),
        Case(
            "threshold_otsu", "512x512 uint8", lambda: levels.threshold_otsu(gray), "numpy.histogram alone",
            lambda: np.histogram(gray, 256, (0, 256)),
        ),
        Case(
            "equalize_histogram", "512x512x3 uint8", lambda: levels.equalize_histogram(rgb),
            "Pillow, ImageOps.equalize", lambda: np.asarray(ImageOps.equalize(picture)),
        ),
        morphology_case("erode", morphology.erode, scipy.ndimage.grey_erosion),
        morphology_case("dilate", morphology.dilate, scipy.ndimage.grey_dilation),
        morphology_case("opening", morphology.opening, scipy.ndimage.grey_opening),
        morphology_case("closing", morphology.closing, scipy.ndimage.grey_closing),
        Case(
            "connected_components", "1024x1024, blobs", lambda: components.connected_components(blobs),
            "scipy.ndimage.label", lambda: scipy.ndimage.label(blobs),
        ),
        Case(
            "connected_components", "1024x1024, noise", lambda: components.connected_components(noise),
            "scipy.ndimage.label", lambda: scipy.ndimage.label(noise), variant="noise",
        ),
    ]  # fmt: skip


def _tables(random: np.random.Generator) -> list[Case]:
    x = random.standard_normal((20_000, 16))
    q = np.array([0.05, 0.5, 0.95])
    keys, values = random.integers(0, 1000, 200_000), random.standard_normal(200_000)
    present = np.arange(1000)
    sample, spots = random.exponential(size=500), np.linspace(80, 120, 10)

    def grouped() -> object:
        aggregates = (
            scipy.ndimage.sum_labels, scipy.ndimage.mean, scipy.ndimage.minimum, scipy.ndimage.maximum,
        )  # fmt: skip
        return [aggregate(values, keys, present) for aggregate in aggregates]

    def rolled() -> object:
        mean = scipy.ndimage.uniform_filter1d(values, 20)
        squares = scipy.ndimage.uniform_filter1d(values * values, 20)
        deviation = np.sqrt(np.maximum(squares - mean * mean, 0))
        extremes = scipy.ndimage.minimum_filter1d(values, 20), scipy.ndimage.maximum_filter1d(values, 20)
        return mean, deviation, extremes

    def priced() -> object:
        draws = np.random.default_rng(0).standard_normal(50_000)
        payoffs = np.maximum(spots[:, np.newaxis] * np.exp(0.2 * draws - 0.02) - 100, 0)
        return payoffs.mean(axis=1), payoffs.std(axis=1, ddof=1)

    def bootstrapped() -> object:
        return scipy.stats.bootstrap(
            (sample,), np.mean, n_resamples=5000, batch=100, method="percentile", rng=np.random.default_rng(0)
        )

    return [
        Case(
            "histogram", "200,000 in 50 bins", lambda: statistics.histogram(values, bins=50), "numpy.histogram",
            lambda: np.histogram(values, 50),
        ),
        Case(
            "monte_carlo_option", "10 spots, 50,000 paths",
            lambda: finance.monte_carlo_option(spots, strike=100.0, paths=50_000),
            "NumPy, all payoffs in one array", priced,
        ),
        Case(
            "quantile", "20,000 x 16, 3 quantiles", lambda: tables.quantile(x, q), "numpy.quantile",
            lambda: np.quantile(x, q, axis=0),
        ),
        Case("covariance", "20,000 x 16", lambda: tables.covariance(x), "numpy.cov", lambda: np.cov(x, rowvar=False)),
        Case(
            "correlation", "20,000 x 16", lambda: tables.correlation(x), "numpy.corrcoef",
            lambda: np.corrcoef(x, rowvar=False),
        ),
        Case(
            "group_by", "200,000 rows, 1000 keys", lambda: tables.group_by(keys, values),
            "scipy.ndimage, four aggregates", grouped,
        ),
        Case(
            "kmeans", "20,000 x 16, 8 clusters, 20 times",
            lambda: clustering.kmeans(x, clusters=8, max_iterations=20, tolerance=0.0), "sklearn.cluster.KMeans",
            lambda: KMeans(8, n_init=1, max_iter=20, tol=0, random_state=0).fit(x),
        ),
        Case(
            "pca", "20,000 x 16, 4 components", lambda: clustering.pca(x, components=4), "sklearn.decomposition.PCA",
            lambda: PCA(4).fit_transform(x),
        ),
        Case(
            "rolling", "200,000, window 20", lambda: series.rolling(values, window=20),
            "scipy.ndimage, four filters", rolled,
        ),
        Case(
            "bootstrap", "500, 5000 resamples", lambda: resampling.bootstrap(sample, resamples=5000),
            "scipy.stats.bootstrap", bootstrapped,
        ),
    ]  # fmt: skip
