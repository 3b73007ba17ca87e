"""`interpolate` against NumPy's lines and SciPy's splines."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline

from unlatch import KernelError
from unlatch.compute.kernels.interpolation import interpolate


@given(
    n=st.one_of(st.integers(2, 12), st.sampled_from([33, 34, 35, 36, 70, 500])),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    dtype=st.sampled_from(["f2", "f4", "f8"]),
    kind=st.sampled_from(["linear", "cubic"]),
    seed=st.integers(0, 2**32),
)
def test_interpolate_agrees_with_numpy_and_scipy(
    n: int, batch: tuple[int, ...], dtype: str, kind: str, seed: int
) -> None:
    """Two samples and many, evenly spaced or not, one function and a batch, at places in any order."""
    random = np.random.default_rng(seed)
    x = np.cumsum(random.uniform(0.25, 1, n) if dtype != "f2" else np.ones(n)).astype(dtype)
    y = random.standard_normal((*batch, n)).astype(dtype)
    at = np.concatenate([random.uniform(x[0], x[-1], 40), x]).clip(x[0], x[-1]).astype(dtype)
    found = interpolate(x, y, at, kind=kind)
    assert found.shape == (*batch, len(at))
    assert found.dtype == (np.float64 if dtype == "f8" else np.float32)
    wide = [array.astype(np.float64) for array in (x, y.reshape(-1, n), at)]
    if kind == "cubic":
        expected = CubicSpline(wide[0], wide[1], axis=1)(wide[2])
    else:
        expected = np.array([np.interp(wide[2], wide[0], row) for row in wide[1]])
    tolerance = 1e-9 if dtype == "f8" else 1e-2
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
@pytest.mark.parametrize("rows", [1, 2])
def test_interpolate_knows_nothing_outside(kind: str, rows: int) -> None:
    """Places before the first sample, after the last, and NaN places give NaN."""
    y = np.arange(4.0) * np.ones((rows, 1))
    found = interpolate(np.arange(4.0), y, np.array([-0.1, 0, 3, 3.1, np.nan, np.inf]), kind=kind)
    np.testing.assert_allclose(found, [[np.nan, 0, 3, np.nan, np.nan, np.nan]] * rows, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_nan_spoils_the_lines_beside_it_only(rows: int) -> None:
    """Samples before and after a NaN are interpolated as usual."""
    y = np.array([0.0, 1, np.nan, 3, 4]) * np.ones((rows, 1))
    found = interpolate(np.arange(5.0), y, np.array([0.5, 1, 1.5, 2, 2.5, 3, 3.5]))
    np.testing.assert_array_equal(found, [[0.5, 1, np.nan, np.nan, np.nan, 3, 3.5]] * rows)


def test_a_nan_spoils_its_spline_only() -> None:
    """The other functions of the batch are interpolated as usual."""
    y = np.ones((3, 50))
    y[1, 20] = np.nan
    found = interpolate(np.arange(50.0), y, np.linspace(0, 49, 99), kind="cubic")
    np.testing.assert_allclose(found[[0, 2]], 1)
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(("rows", "places"), [(0, 3), (2, 0), (0, 0)])
def test_interpolate_of_nothing_is_nothing(rows: int, places: int) -> None:
    """Without functions or places there are no values."""
    assert interpolate(np.arange(3.0), np.zeros((rows, 3)), np.zeros(places)).shape == (rows, places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.array([0.0, 2, 1])}, r"x: wanted increasing places, got 2.0 before 1.0 at \[2\]"),
        ({"x": np.array([0.0, 1, 1])}, r"x: wanted increasing places, got 1.0 before 1.0 at \[2\]"),
        ({"x": np.array([0.0, np.nan, 1])}, r"x: wanted finite elements, got nan at \[1\]"),
        ({"x": np.zeros(1), "y": np.zeros(1)}, "x: wanted at least 2 samples, got 1"),
        ({"kind": "quintic"}, 'kind: wanted "linear" or "cubic", got "quintic"'),
        ({"y": np.zeros((10**4, 3)), "at": np.zeros(10**4)}, "y, at: wanted a result of at most 67108864 bytes"),
    ],
)
def test_interpolate_refuses_what_is_no_function(arguments: dict[str, Any], message: str) -> None:
    """Places that do not increase and results out of proportion are refused by name."""
    with pytest.raises(KernelError, match=message):
        interpolate(**{"x": np.arange(3.0), "y": np.zeros(3), "at": np.zeros(1)} | arguments)
