"""`threshold_otsu` against every threshold tried, `equalize_histogram` against Pillow's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps

from tests.compute.kernels.pictures import Image, by_channel, random_image
from unlatch import KernelError
from unlatch.compute.kernels.levels import equalize_histogram, threshold_otsu


def within(pixels: Image, threshold: float) -> float:
    """Return the variance within both parts, by the formula that defines Otsu's criterion."""
    parts = (pixels[pixels <= threshold], pixels[pixels > threshold])
    return float(sum(((part - part.mean()) ** 2).sum() for part in parts if part.size))


@given(
    shape=st.one_of(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.just((9, 8, 3))),
    dtype=st.sampled_from(["u1", "i1", "u2", "i2"]),
    span=st.sampled_from([1, 5, 60, 127]),
    seed=st.integers(0, 2**32),
)
def test_otsu_is_the_best_of_all_thresholds(shape: tuple[int, ...], dtype: str, span: int, seed: int) -> None:
    """No level of the image splits it with less variance within the parts."""
    image = (random_image(seed, shape, "u1") % span).astype(dtype)
    image = image - image.dtype.type(span // 2) if dtype[0] == "i" else image
    threshold, above = threshold_otsu(image)
    assert threshold.shape == shape[2:]
    assert above.dtype == np.bool_
    np.testing.assert_array_equal(above, image > threshold)
    for channel, chosen in zip(image.reshape(*shape[:2], -1).transpose(2, 0, 1), np.atleast_1d(threshold), strict=True):
        pixels = channel.astype(np.float64)
        levels = np.unique(pixels)
        best = min(within(pixels, level) for level in levels[: max(1, len(levels) - 1)])
        assert chosen in levels
        assert within(pixels, float(chosen)) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_otsu_parts_floats_between_two_peaks(dtype: str) -> None:
    """Two peaks are separated between them. NaN and infinities are not counted."""
    random = np.random.default_rng(3)
    image = np.where(random.random((80, 90)) < 0.3, 5.0, 1.0) + random.normal(0, 0.2, (80, 90))
    image[3, 4], image[5, 6], image[7, 8] = np.nan, np.inf, -np.inf
    threshold, above = threshold_otsu(image.astype(dtype))
    assert 1.6 < threshold < 4.2
    assert not above[3, 4]
    assert above[5, 6]
    assert 0.2 < above.mean() < 0.4


def test_otsu_of_a_large_image_counts_every_pixel() -> None:
    """Bytes counted in pairs, with an odd number of them, give the counts of bytes counted one by one."""
    image = random_image(5, (601, 701), "u1") // 3
    counted = image.reshape(-1)
    small = threshold_otsu(np.concatenate([counted[:200_000], counted[200_000:]])[:, np.newaxis].astype(np.uint16))
    assert threshold_otsu(image).threshold == small.threshold
    signed = (image.astype(np.int16) - 128).astype(np.int8)
    assert threshold_otsu(signed).threshold == small.threshold - 128


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((3, 4), 7, np.uint8), 7),
        (np.full((3, 4), 2.5), 2.5),
        (np.zeros((0, 4)), np.nan),
        (np.zeros((0, 4), np.uint8), np.nan),
        (np.full((2, 2), np.nan), np.nan),
    ],
)
def test_otsu_of_one_level_or_none(image: Image, expected: float) -> None:
    """A single level is its own threshold, with nothing above it. Without pixels there is none."""
    threshold, above = threshold_otsu(image)
    np.testing.assert_equal(float(threshold), float(expected))
    assert above.shape == image.shape
    assert not above.any()


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, np.nextafter(1.0, 2)), (-1.7e308, 1.7e308), (1e-300, 3e-300), (1e15, 1e15 + 1)]
)
def test_otsu_parts_two_levels_whatever_they_are(low: float, high: float) -> None:
    """Neighbouring floats are separated, and floats whose difference is infinite."""
    image = np.array([[low, high, high], [low, low, high]])
    np.testing.assert_array_equal(threshold_otsu(image).above, image == high)


def test_otsu_of_no_channels_has_none() -> None:
    """Without channels there are no thresholds."""
    threshold, above = threshold_otsu(np.zeros((3, 4, 0)))
    assert (threshold.shape, above.shape) == ((0,), (3, 4, 0))


def pillow_equalized(image: Image) -> Image:
    """Equalize each channel with Pillow."""
    return by_channel(lambda plane: np.asarray(ImageOps.equalize(Pillow.fromarray(plane))), image)


@given(divisor=st.sampled_from([1, 3, 40, 200]), channels=st.sampled_from([(), (3,)]), seed=st.integers(0, 2**32))
def test_equalize_agrees_with_pillow(divisor: int, channels: tuple[int, ...], seed: int) -> None:
    """Images agree to the bit where Pillow's whole-number step is exact, and within a level elsewhere."""
    image = random_image(seed, (600, 601, *channels), "u1") // np.uint8(divisor)
    assert np.abs(equalize_histogram(image).astype(int) - pillow_equalized(image)).max() <= 1
    dark = image[:255, :71] % 100
    whole = np.concatenate([dark, np.full_like(dark[:5], 200)])  # The brightest pixels do not count for the step.
    np.testing.assert_array_equal(equalize_histogram(whole), pillow_equalized(whole))


@pytest.mark.parametrize("image", [np.zeros((1, 1), np.uint8), np.full((30, 20, 3), 9, np.uint16)])
def test_equalize_leaves_one_level_alone(image: Image) -> None:
    """An image of one level stays unchanged."""
    np.testing.assert_array_equal(equalize_histogram(image), image)


def test_equalize_spreads_sixteen_bits() -> None:
    """A dark image of 16 bits fills its range evenly, and keeps the order of its levels."""
    image = random_image(2, (500, 500), "u2") // np.uint16(16)
    spread = equalize_histogram(image)
    assert spread.dtype == np.uint16
    assert np.abs(np.quantile(spread, [0.1, 0.5, 0.9]) / 65_535 - [0.1, 0.5, 0.9]).max() < 0.02
    order = np.argsort(image, axis=None)
    assert (np.diff(spread.reshape(-1)[order].astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 4, 0)])
def test_equalize_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    """An image without pixels, or without channels, keeps its shape."""
    assert equalize_histogram(np.zeros(shape, np.uint8)).shape == shape


def test_levels_refuse_wide_integers() -> None:
    """Integers of 32 bits are refused: their histogram would not fit memory."""
    with pytest.raises(KernelError, match="image: wanted uint8 or uint16, got uint32"):
        equalize_histogram(np.zeros((4, 4), np.uint32))
    with pytest.raises(KernelError, match="image: wanted floats or 8- or 16-bit integers, got int64"):
        threshold_otsu(np.zeros((4, 4), np.int64))


def test_levels_refuse_histograms_out_of_proportion() -> None:
    """Many channels of few pixels are refused: they would be all histograms."""
    wide = np.broadcast_to(np.uint16(0), (1, 1, 4097))
    for levels_of in (equalize_histogram, threshold_otsu):
        with pytest.raises(KernelError, match="image: wanted channels times levels of at most 268435456, got 2685"):
            levels_of(wide)
