"""`connected_components` against `scipy.ndimage.label`."""

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from unlatch import KernelError
from unlatch.compute.kernels.components import connected_components

STRUCTURES = {4: scipy.ndimage.generate_binary_structure(2, 1), 8: scipy.ndimage.generate_binary_structure(2, 2)}


def assert_as_scipy(mask: np.ndarray[Any, Any], connectivity: int) -> None:
    """Check that the same numbers are at the same places."""
    labels, components = connected_components(mask, connectivity=connectivity)
    expected, number = scipy.ndimage.label(mask, STRUCTURES[connectivity])
    assert labels.dtype == np.int32
    assert components == number
    np.testing.assert_array_equal(labels, expected)


@given(
    height=st.integers(0, 40),
    width=st.integers(0, 40),
    density=st.floats(0, 1),
    smooth=st.sampled_from([0, 1, 2]),
    connectivity=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**32),
)
def test_components_agree_with_scipy(
    height: int, width: int, density: float, smooth: int, connectivity: int, seed: int
) -> None:
    """Specks, labyrinths and blobs, full masks and empty ones, numbered as SciPy numbers them."""
    noise = np.random.default_rng(seed).random((height, width))
    if noise.size:
        noise = scipy.ndimage.gaussian_filter(noise, smooth)
        mask = noise < np.quantile(noise, density)
        mask.setflags(write=False)
        assert_as_scipy(mask, connectivity)
    else:
        labels, components = connected_components(noise, connectivity=connectivity)
        assert labels.shape == noise.shape
        assert components == 0


@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_that_wind_are_one(connectivity: int) -> None:
    """A spiral and a comb, whose parts are joined only after many others, are one shape each."""
    spiral = np.zeros((101, 101), np.uint8)
    for ring in range(0, 50, 2):
        spiral[ring, ring : 101 - ring] = spiral[100 - ring, ring : 101 - ring] = 1
        spiral[ring : 101 - ring, 100 - ring] = spiral[ring + 2 : 101 - ring, ring] = 1
        spiral[ring + 2, ring : ring + 3] = 1
    assert_as_scipy(spiral, connectivity)
    comb = np.zeros((60, 61))
    comb[:, ::2] = 0.5
    comb[-1] = -1
    assert connected_components(comb, connectivity=connectivity).components == 1
    assert_as_scipy(comb, connectivity)


def test_components_touch_at_corners_with_eight_only() -> None:
    """A chessboard is one shape or thirty-two. The end of a row does not touch the start of the next."""
    board = (np.indices((8, 8)).sum(axis=0) % 2).astype(bool)
    assert connected_components(board, connectivity=8).components == 1
    assert connected_components(board, connectivity=4).components == 32
    ends = np.array([[0, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert connected_components(ends, connectivity=8).components == 3


def test_what_is_not_zero_belongs_to_a_shape() -> None:
    """Negative, complex and NaN pixels belong to shapes."""
    for value in (-1.0, np.nan, 1j):
        assert connected_components(np.array([[value, 0, value]])).components == 2


@pytest.mark.parametrize(
    ("mask", "connectivity", "message"),
    [
        (np.zeros((2, 2)), 6, "connectivity: wanted 4 or 8, got 6"),
        (np.array([[b"a"]]), 4, "mask: wanted bools or numbers, got "),
        (np.broadcast_to(np.uint8(0), (2**16, 2**15)), 4, "mask: wanted a number of pixels of at most 2147483647"),
    ],
)
def test_components_refuse_what_they_cannot_label(mask: np.ndarray[Any, Any], connectivity: int, message: str) -> None:
    """Unknown connectivities, unknown dtypes and images beyond the labels' range are refused."""
    with pytest.raises(KernelError, match=message):
        connected_components(mask, connectivity=connectivity)
