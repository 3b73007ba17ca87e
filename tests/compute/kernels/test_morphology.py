"""Morphology against `scipy.ndimage`, channel by channel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from tests.compute.kernels.pictures import DTYPES, Image, by_channel, random_image, shapes
from unlatch import KernelError
from unlatch.compute.kernels.morphology import closing, dilate, erode, opening

REFERENCES: dict[Callable[..., Image], Callable[..., Image]] = {
    erode: scipy.ndimage.grey_erosion,
    dilate: scipy.ndimage.grey_dilation,
    opening: scipy.ndimage.grey_opening,
    closing: scipy.ndimage.grey_closing,
}
operations = pytest.mark.parametrize("operation", REFERENCES)


@operations
@given(
    shape=shapes,
    dtype=st.sampled_from([*DTYPES, "?", "i4", "u4"]),
    size=st.sampled_from([1, 3, 5, 7, 9, 17, 31, 201]),
    seed=st.integers(0, 2**32),
)
def test_morphology_agrees_with_scipy(
    operation: Callable[..., Image], shape: tuple[int, ...], dtype: str, size: int, seed: int
) -> None:
    """Any image and any square, also larger than the image, agree to the bit."""
    image = random_image(seed, shape, dtype)
    found = operation(image, size=size)
    assert found.dtype == image.dtype
    # SciPy takes neither bools nor float16; both have the same order in float32.
    wide = image.astype(np.float32) if image.dtype.kind == "b" or dtype == "f2" else image
    expected = by_channel(lambda plane: REFERENCES[operation](plane, size=(size, size)), wide)
    np.testing.assert_array_equal(found, expected.astype(image.dtype))


def test_large_integers_keep_their_digits() -> None:
    """Neighbouring values that float64 could not tell apart are told apart."""
    image = np.array([[2**62, 2**62 + 1]])
    assert erode(image).tolist() == [[2**62, 2**62]]
    assert dilate(image).tolist() == [[2**62 + 1, 2**62 + 1]]


@operations
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (4, 4, 0), (0, 4, 3)])
def test_morphology_of_nothing_is_nothing(operation: Callable[..., Image], shape: tuple[int, ...]) -> None:
    """An image without pixels, or without channels, keeps its shape."""
    assert operation(np.zeros(shape)).shape == shape


def test_a_nan_fills_its_square() -> None:
    """A NaN fills its square exactly, in erosion and in dilation."""
    image = np.zeros((9, 9))
    image[4, 4] = np.nan
    for operation in (erode, dilate):
        bad = np.isnan(operation(image, size=3))
        assert bad[3:6, 3:6].all()
        assert bad.sum() == 9


@operations
@pytest.mark.parametrize("size", [0, -3, 2, 4])
def test_morphology_refuses_a_square_without_a_middle(operation: Callable[..., Image], size: int) -> None:
    """An even or negative size is refused."""
    with pytest.raises(KernelError, match=f"size: wanted an odd number of at least 1, got {size}"):
        operation(np.zeros((4, 4)), size=size)


@operations
def test_morphology_refuses_what_has_no_order(operation: Callable[..., Any]) -> None:
    """Complex numbers are refused by their dtype."""
    with pytest.raises(KernelError, match="image: wanted bools, integers or floats, got complex128"):
        operation(np.zeros((4, 4), np.complex128))
