"""`median_filter` against `scipy.ndimage`, channel by channel."""

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compute.kernels.pictures import DTYPES, by_channel, random_image, shapes
from unlatch import KernelError
from unlatch.compute.kernels.medians import median_filter


@settings(max_examples=60)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1, 3, 5, 7, 9, 11, 15, 31]),
    seed=st.integers(0, 2**32),
)
def test_median_agrees_with_scipy(shape: tuple[int, ...], dtype: str, size: int, seed: int) -> None:
    """Small windows and large, also larger than the image, agree to the bit."""
    image = random_image(seed, shape, dtype)
    found = median_filter(image, size=size)
    assert found.dtype == image.dtype
    wide = image.astype(np.float32) if dtype == "f2" else image
    # NumPy reflects the image here, since SciPy's own reflection is off by one where an image is many times smaller
    # than the window.
    around = [(size, size)] * 2 + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(wide, around, mode="symmetric")
    expected = by_channel(lambda plane: scipy.ndimage.median_filter(plane, size=(size, size)), padded)
    inside = expected[size : size + shape[0], size : size + shape[1]]
    np.testing.assert_array_equal(found, inside.astype(image.dtype))


@pytest.mark.parametrize(("size", "dtype"), [(3, "f8"), (5, "f4"), (7, "f8"), (11, "f2")])
def test_a_nan_fills_its_square(size: int, dtype: str) -> None:
    """The output is NaN where the window contains the NaN and nowhere else, by exchanges and by partitions."""
    image = np.array(random_image(3, (40, 40), dtype))
    image[20, 20] = np.nan
    bad = np.isnan(median_filter(image, size=size))
    around = slice(20 - size // 2, 20 + size // 2 + 1)
    assert bad[around, around].all()
    assert bad.sum() == size**2


def test_a_median_forgets_specks() -> None:
    """A bright pixel among nine disappears, and an edge stays where it was."""
    image = np.zeros((9, 9), np.uint8)
    image[:, 5:] = 200
    speckled = image.copy()
    speckled[4, 2] = 255
    np.testing.assert_array_equal(median_filter(speckled), image)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (4, 4, 0), (0, 4, 3)])
def test_median_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    """An image without pixels, or without channels, keeps its shape."""
    assert median_filter(np.zeros(shape), size=5).shape == shape


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "size: wanted an odd number of at least 1, got 0"),
        (4, "size: wanted an odd number of at least 1, got 4"),
        (33, "size: wanted a square with a side of at most 31, got 33"),
    ],
)
def test_median_refuses_windows_out_of_proportion(size: int, message: str) -> None:
    """A window without a middle, or with a thousand pixels, is refused."""
    with pytest.raises(KernelError, match=message):
        median_filter(np.zeros((4, 4)), size=size)


def test_median_refuses_work_out_of_proportion() -> None:
    """Many pixels and large windows together are refused: they would take minutes."""
    with pytest.raises(KernelError, match="size: wanted pixels times size squared of at most 20000000000"):
        median_filter(np.broadcast_to(np.uint8(0), (2**13, 2**13)), size=31)


def test_a_row_longer_than_a_tile_has_no_seams() -> None:
    """A row longer than a tile has no seams, by exchanges and by partitions."""
    image = random_image(3, (2, 30_000), "f4")
    for size in (3, 9):
        expected = scipy.ndimage.median_filter(image, size=(size, size))
        np.testing.assert_array_equal(median_filter(image, size=size), expected)


def test_median_refuses_wide_integers() -> None:
    """The filter takes the dtypes of the other image filters, and no wide integers."""
    with pytest.raises(KernelError, match="image: wanted floats or 8- or 16-bit integers, got int32"):
        median_filter(np.zeros((4, 4), np.int32))
