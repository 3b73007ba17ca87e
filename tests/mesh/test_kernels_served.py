"""Every built-in kernel through a real mesh: the reply is as declared, and equals a direct call's result."""

from typing import Any

import numpy as np
import pytest

from tests.support.mesh import Mesh
from unlatch import BlockingClient
from unlatch.compute.worker.catalogue import load

MATRIX = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 5.0]])
SERIES = np.arange(12.0).reshape(3, 4) % 5
TALL = SERIES.T.copy()
PICTURE = (np.arange(240).reshape(8, 10, 3) * 7 % 256).astype(np.uint8)

CALLS: dict[str, tuple[tuple[np.ndarray[Any, Any], ...], dict[str, Any]]] = {
    "identity": ((SERIES,), {}),
    "matmul": ((SERIES, TALL), {}),
    "solve": ((MATRIX, TALL[:3]), {}),
    "lstsq": ((TALL, np.arange(4.0)), {}),
    "pinv": ((TALL,), {}),
    "svd": ((TALL,), {}),
    "eigh": ((MATRIX,), {}),
    "qr": ((TALL,), {}),
    "cholesky": ((MATRIX,), {}),
    "expm": ((MATRIX,), {}),
    "integrate_linear_ode": ((-MATRIX, np.ones(3), np.zeros(3)), {"duration": 1.0, "steps": 5}),
    "fft": ((SERIES,), {}),
    "convolve": ((SERIES, np.ones(2)), {"mode": "full"}),
    "interpolate": ((np.arange(4.0), SERIES, np.array([0.5, 9.0])), {"kind": "cubic"}),
    "gaussian_blur": ((PICTURE,), {"sigma": 2.0}),
    "sobel": ((PICTURE,), {}),
    "resize": ((PICTURE,), {"height": 5, "width": 21}),
    "median_filter": ((PICTURE,), {"size": 5}),
    "threshold_otsu": ((PICTURE,), {}),
    "equalize_histogram": ((PICTURE,), {}),
    "erode": ((PICTURE,), {}),
    "dilate": ((PICTURE > 100,), {}),
    "opening": ((PICTURE,), {"size": 3}),
    "closing": ((PICTURE,), {"size": 3}),
    "connected_components": ((PICTURE[..., 0] > 100,), {"connectivity": 8}),
    "histogram": ((SERIES,), {"bins": 3}),
    "monte_carlo_option": ((np.array([90.0, 100.0]),), {"strike": 95.0, "paths": 100}),
    "quantile": ((SERIES, np.array([0.5])), {}),
    "covariance": ((TALL,), {}),
    "correlation": ((TALL,), {}),
    "group_by": ((np.array([1, 2, 1]), SERIES), {}),
    "kmeans": ((TALL,), {"clusters": 2}),
    "pca": ((TALL,), {"components": 2}),
    "rolling": ((SERIES,), {"window": 2}),
    "bootstrap": ((np.arange(5.0),), {"resamples": 100, "statistic": "median"}),
}


def test_every_kernel_is_called_here() -> None:
    """Each built-in kernel, also a new one, is called through a mesh."""
    assert CALLS.keys() == load(()).specs.keys()


@pytest.mark.parametrize("name", CALLS)
def test_a_served_kernel_gives_what_a_call_gives(mesh: Mesh, name: str) -> None:
    """A worker gives the same names, shapes, dtypes and numbers as a direct call."""
    arrays, scalars = CALLS[name]
    direct = load(()).functions[name](*arrays, **scalars)
    with BlockingClient(mesh.gateway) as client:
        served = client.call(name, *arrays, **scalars)
    if isinstance(direct, tuple):
        assert served._fields == direct._fields  # type: ignore[attr-defined]
    else:
        direct, served = (direct,), (served,)
    for ours, theirs in zip(direct, served, strict=True):
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-12)
