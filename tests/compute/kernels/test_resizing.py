"""`resize` against Pillow's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from tests.compute.kernels.pictures import DTYPES, Image, by_channel, random_image, shapes
from unlatch import KernelError
from unlatch.compute.kernels.resizing import resize

METHODS = {
    "bilinear": Pillow.Resampling.BILINEAR,
    "bicubic": Pillow.Resampling.BICUBIC,
    "lanczos": Pillow.Resampling.LANCZOS,
}


def pillow_resized(image: Image, height: int, width: int, method: str) -> Image:
    """Resize each channel with Pillow, in single precision."""

    def resized(plane: Image) -> Image:
        picture = Pillow.fromarray(plane.astype(np.float32))
        return np.asarray(picture.resize((width, height), METHODS[method]))

    return by_channel(resized, image)


@given(
    shape=shapes,
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(sorted(METHODS)),
    seed=st.integers(0, 2**32),
)
def test_resize_agrees_with_pillow(
    shape: tuple[int, ...], height: int, width: int, dtype: str, method: str, seed: int
) -> None:
    """Larger, smaller, and both along different axes. Integers are the nearest ones within their range."""
    image = random_image(seed, shape, dtype)
    resized = resize(image, height=height, width=width, method=method)
    assert resized.dtype == image.dtype
    assert resized.shape == (height, width, *shape[2:])
    expected = pillow_resized(image, height, width, method)
    if image.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        clipped = np.clip(expected, limits.min, limits.max)
        assert np.abs(resized - clipped).max() <= 0.5 + 1e-6 * limits.max
    else:
        np.testing.assert_allclose(resized, expected, rtol=2e-3, atol=0.3 if dtype == "f2" else 1e-3)


def test_resize_keeps_a_flat_image_at_its_level() -> None:
    """Weights sum to one, also at borders."""
    assert (resize(np.full((37, 41, 3), 255, np.uint8), height=11, width=90, method="lanczos") == 255).all()


def test_resize_to_the_same_size_is_the_image() -> None:
    """An image that has the size already is returned unchanged."""
    image = random_image(1, (30, 20, 3), "u1")
    np.testing.assert_array_equal(resize(image, height=30, width=20), image)


def test_a_shrunk_pattern_is_grey() -> None:
    """Stripes finer than the new pixels do not alias."""
    stripes = np.tile([0.0, 1.0], (64, 64))
    assert np.abs(resize(stripes, height=8, width=9)[:, 1:-1] - 0.5).max() < 0.05


@pytest.mark.parametrize("channels", [(), (3,), (7,)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_resize_keeps_what_is_not_finite_to_what_it_takes_part_in(channels: tuple[int, ...], value: float) -> None:
    """Output pixels where a NaN has a weight are NaN, and the others are as they would be without it."""
    image = np.array(random_image(3, (200, 150, *channels), "f4"))
    without = image.copy()
    image[100, 50], without[100, 50] = value, 0
    resized, expected = resize(image, height=100, width=75), resize(without, height=100, width=75)
    bad = np.isnan(resized)
    assert bad[48:52, 24:27].any()
    bad_rows, bad_columns = np.nonzero(bad.reshape(100, 75, -1).any(axis=2))
    assert set(bad_rows) <= set(range(48, 53))
    assert set(bad_columns) <= set(range(23, 28))
    np.testing.assert_allclose(resized[~bad], expected[~bad], rtol=1e-5)


def test_resize_of_no_channels_has_none() -> None:
    """The result has the requested size, and no channels."""
    assert resize(np.zeros((4, 5, 0)), height=2, width=3).shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (np.zeros((4, 4)), {"height": 0}, "height: wanted 1 to 65536, got 0"),
        (np.zeros((4, 4)), {"width": 65_537}, "width: wanted 1 to 65536, got 65537"),
        (np.zeros((4, 4)), {"height": 60_000, "width": 60_000}, "height, width: wanted a result of at most 67108864"),
        (np.zeros((4, 4)), {"method": "nearest"}, 'method: wanted "bilinear" or "bicubic" or "lanczos", got "nearest"'),
        (np.zeros((4, 4), np.int32), {}, "image: wanted floats or 8- or 16-bit integers, got int32"),
        (np.zeros((0, 4)), {}, r"image: wanted pixels, got shape \(0, 4\)"),
    ],
)
def test_resize_refuses_what_it_cannot_do(image: Image, arguments: dict[str, Any], message: str) -> None:
    """Sizes out of proportion, unknown methods and empty images are refused by name."""
    with pytest.raises(KernelError, match=message):
        resize(image, **{"height": 3, "width": 3} | arguments)
