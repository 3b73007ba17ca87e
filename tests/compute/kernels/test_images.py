"""The image filters against `scipy.ndimage`, channel by channel."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from tests.compute.kernels.pictures import DTYPES, Image, by_channel, random_image, shapes
from unlatch import KernelError
from unlatch.compute.kernels.images import gaussian_blur, sobel

TOLERANCES = {"f2": 1e-3, "f4": 2e-6, "f8": 1e-12}


def scipy_blur(image: Image, sigma: float, truncate: float) -> Image:
    """Filter each channel with SciPy's Gaussian, in double precision."""
    return by_channel(
        lambda plane: scipy.ndimage.gaussian_filter(plane.astype(np.float64), sigma, truncate=truncate), image
    )


def scipy_sobel(image: Image) -> Image:
    """Return the magnitude of SciPy's two Sobel derivatives of each channel, in double precision."""
    wide = image.astype(np.float64)
    return by_channel(lambda plane: np.hypot(scipy.ndimage.sobel(plane, 0), scipy.ndimage.sobel(plane, 1)), wide)


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    sigma=st.floats(0, 30),
    truncate=st.floats(0, 6),
    seed=st.integers(0, 2**32),
)
def test_blur_agrees_with_scipy(shape: tuple[int, ...], dtype: str, sigma: float, truncate: float, seed: int) -> None:
    """Any image agrees with SciPy, also with radii many times its size.

    Integers are within half a unit of the exact value.
    """
    image = random_image(seed, shape, dtype)
    blurred = gaussian_blur(image, sigma=sigma, truncate=truncate)
    assert blurred.dtype == image.dtype
    assert blurred.shape == image.shape
    expected = scipy_blur(image, sigma, truncate)
    if image.dtype.kind in "iu":
        assert np.abs(blurred - expected).max() <= 0.5 + 0.02  # the margin is single precision's at 65,535
    else:
        np.testing.assert_allclose(blurred, expected, rtol=TOLERANCES[dtype], atol=100 * TOLERANCES[dtype])


def test_blur_keeps_a_flat_image_at_its_level() -> None:
    """The brightest pixels do not overflow, and the weights sum to one."""
    image = np.full((50, 60, 3), 255, np.uint8)
    assert (gaussian_blur(image, sigma=7.3) == 255).all()


def test_blur_never_mixes_channels() -> None:
    """Two channels that are empty stay empty beside one that is not."""
    image = np.zeros((20, 30, 3))
    image[10, 15, 1] = 1
    blurred = gaussian_blur(image, sigma=3)
    assert blurred[10, 15, 1] < 1
    assert not blurred[..., [0, 2]].any()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_blur_carries_what_is_not_finite_as_far_as_its_radius(dtype: str) -> None:
    """NaN and infinities reach the pixels that they reach in SciPy, and the rest of the image is unaffected."""
    image = np.array(random_image(5, (70, 80), dtype))
    image[3, 4], image[30, 40], image[33, 60], image[32, 45] = np.nan, np.inf, -np.inf, -np.inf
    expected = scipy_blur(image, 1.5, 4.0)
    np.testing.assert_allclose(gaussian_blur(image, sigma=1.5), expected, rtol=1e-5, atol=1e-4)


def test_blur_of_values_whose_sum_overflows_is_finite() -> None:
    """Values near float32's largest are blurred, not taken for infinities."""
    image = np.full((40, 40), 1e38, np.float32)
    np.testing.assert_allclose(gaussian_blur(image, sigma=2), image, rtol=1e-6)


@pytest.mark.parametrize("filtered", [gaussian_blur, sobel])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (4, 4, 0), (0, 4, 3)])
def test_filters_of_nothing_give_nothing(filtered: Callable[[Image], Image], shape: tuple[int, ...]) -> None:
    """An image without pixels, or without channels, keeps its shape."""
    assert filtered(np.zeros(shape, np.float32)).shape == shape


@pytest.mark.parametrize("arguments", [{"sigma": 0.0}, {"truncate": 0.0}, {"sigma": 1e-200, "truncate": 1e202}])
def test_blur_by_nothing_is_the_image(arguments: dict[str, float]) -> None:
    """With no width, or no radius, every pixel stays as it was."""
    image = random_image(1, (9, 7, 3), "f8")
    np.testing.assert_array_equal(gaussian_blur(image, **arguments), image)


@pytest.mark.parametrize("name", ["sigma", "truncate"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_blur_refuses_a_width_that_is_none(name: str, value: float) -> None:
    """A negative, infinite or undefined width is refused by name."""
    with pytest.raises(KernelError, match=rf"{name}: wanted a finite number of at least 0, got {value}"):
        gaussian_blur(np.zeros((4, 4)), **{name: value})


@pytest.mark.parametrize(("sigma", "truncate"), [(257.0, 4.0), (1e300, 1e300)])
def test_blur_refuses_a_radius_out_of_proportion(sigma: float, truncate: float) -> None:
    """A small image cannot ask for the work of a huge one."""
    with pytest.raises(KernelError, match=r"sigma: wanted a radius .* in pixels of at most 1024, got"):
        gaussian_blur(np.zeros((4, 4)), sigma=sigma, truncate=truncate)


@pytest.mark.parametrize("filtered", [gaussian_blur, sobel])
@pytest.mark.parametrize("dtype", ["i4", "u8"])
def test_filters_refuse_wide_integers(filtered: Callable[[Image], Image], dtype: str) -> None:
    """Integers that single precision cannot hold are refused by their dtype."""
    with pytest.raises(KernelError, match=f"image: wanted floats or 8- or 16-bit integers, got {np.dtype(dtype)}"):
        filtered(np.zeros((4, 4), dtype))


@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_sobel_agrees_with_scipy(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    """Any image has SciPy's gradient, also one that is one pixel wide."""
    image = random_image(seed, shape, dtype)
    steepness = sobel(image)
    assert steepness.dtype == (np.float64 if dtype == "f8" else np.float32)
    assert steepness.shape == image.shape
    tolerance = 1e-12 if dtype == "f8" else 1e-5
    scale = 1.0 if image.dtype.kind == "f" else float(np.iinfo(dtype).max)
    np.testing.assert_allclose(steepness, scipy_sobel(image), rtol=tolerance, atol=100 * tolerance * scale)


def test_sobel_of_many_strips_agrees_with_scipy() -> None:
    """An image larger than a strip has no seams, nor has one whose rows are longer than a strip."""
    for shape in [(300, 500), (5, 40_000), (40_000, 3)]:
        image = random_image(2, shape, "f8")
        np.testing.assert_allclose(sobel(image), scipy_sobel(image), rtol=1e-12, atol=1e-10)


def test_sobel_of_steep_edges_does_not_overflow() -> None:
    """A gradient whose square float64 cannot hold is still a number."""
    image = np.zeros((3, 3))
    image[:, 2] = 1e200
    np.testing.assert_allclose(sobel(image)[1], [0, 4e200, 4e200])


def test_sobel_spreads_nan_to_neighbours_only() -> None:
    """A NaN reaches pixels that are one away, and no others."""
    image = np.zeros((7, 7))
    image[3, 3] = np.nan
    unknown = np.argwhere(np.isnan(sobel(image)))
    assert len(unknown) >= 8
    assert (np.abs(unknown - 3) <= 1).all()
