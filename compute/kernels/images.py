"""Image filters over rows and columns, with each channel by itself.

Both filters reflect the image at its borders (d c b a | a b c d | d c b a) and work on strips of rows, so that the data
of one strip stays in the cache of one core.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from unlatch import kernel
from unlatch.compute.kernels.bands import Band, filtered
from unlatch.compute.kernels.precision import image_dtype
from unlatch.compute.kernels.refusals import require_at_least, require_work

# The work for each pixel grows with the radius: at the limit it is about 0.3 microseconds.
_MAX_RADIUS_PIXELS = 1024

# With fewer output pixels a band wastes the overhead of BLAS; with more it multiplies zeros.
_BLOCK_PIXELS = 64

# A sigma this small does not blur (`scipy.ndimage.gaussian_filter` has the same limit).
_NO_BLUR_SIGMA = 1e-15

_STRIP_ELEMENTS = 32_768


@kernel(pure=True)
def gaussian_blur(
    image: Real[np.ndarray, "h w *channels"], *, sigma: float = 1.0, truncate: float = 4.0
) -> Real[np.ndarray, "h w *channels"]:
    """Blur an image with a Gaussian of standard deviation `sigma` pixels, cut off at `truncate` standard deviations.

    `image` has shape (h, w) or (h, w, channels) and holds floats or 8- or 16-bit integers; the result has its shape and
    dtype, with integers rounded to the nearest. Each channel is blurred by itself. A NaN or an infinity affects only
    pixels within the Gaussian's radius.

    Raises `KernelError` for other dtypes, for a sigma or truncate that is negative or not finite, and for a radius
    (`truncate * sigma`) above 1024 pixels. Source: `scipy.ndimage.gaussian_filter` with `mode="reflect"`, except that
    integers are rounded once, at the end, where SciPy truncates them after each axis.
    """
    dtype = image_dtype(image)
    weights = _gaussian_weights(sigma, truncate)
    if image.size == 0 or len(weights) == 1:
        return image
    pixels = image.reshape(*image.shape[:2], -1).astype(dtype, copy=False)
    return _blur(pixels, weights, image.dtype).reshape(image.shape)


@kernel(pure=True)
def sobel(image: Real[np.ndarray, "h w *channels"]) -> Float[np.ndarray, "h w *channels"]:
    """Compute how steep an image is at each pixel: the magnitude of its Sobel gradient, unscaled.

    `image` has shape (h, w) or (h, w, channels) and holds floats or 8- or 16-bit integers. The result has its shape, is
    float64 for float64 and float32 for all others, and treats each channel by itself. A NaN affects its neighbours (a
    pixel's own value has weight zero).

    Raises `KernelError` for other dtypes. Source: `scipy.ndimage.sobel` along both axes with `mode="reflect"`, joined
    by `numpy.hypot`.
    """
    dtype = image_dtype(image)
    if image.size == 0:
        return np.empty(image.shape, dtype)
    pixels = image.reshape(*image.shape[:2], -1)
    steepness = np.empty(pixels.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for strip in _strips(pixels):
            _sobel_strip(pixels, strip, steepness[strip])
    return steepness.reshape(image.shape)


def _gaussian_weights(sigma: float, truncate: float) -> np.ndarray:
    require_at_least("sigma", sigma, 0)
    require_at_least("truncate", truncate, 0)
    radius = truncate * sigma  # which may be infinite
    require_work("sigma", "a radius (truncate * sigma) in pixels", radius, _MAX_RADIUS_PIXELS)
    if sigma <= _NO_BLUR_SIGMA:
        return np.ones(1)
    radius_pixels = int(radius + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius_pixels, radius_pixels + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def _blur(pixels: np.ndarray, weights: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(pixels.sum()):
            return _blur_finite(pixels, weights, dtype)
        return _blur_apart(pixels, weights, dtype)


def _blur_apart(pixels: np.ndarray, weights: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    # Zero times NaN is NaN, and in a matrix product it would spread over its whole block. So values that are not finite
    # are blurred separately, as masks of the pixels that they affect.
    blurred = _blur_finite(np.where(np.isfinite(pixels), pixels, 0), weights, dtype)
    up, down, unknown = (
        _blur_finite(mask.astype(pixels.dtype), weights, pixels.dtype) > 0
        for mask in (pixels == np.inf, pixels == -np.inf, np.isnan(pixels))
    )
    blurred[up] = np.inf
    blurred[down] = -np.inf
    blurred[unknown | (up & down)] = np.nan
    return blurred


def _blur_finite(pixels: np.ndarray, weights: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    down, across = (_bands(length, weights, pixels.dtype) for length in pixels.shape[:2])
    return filtered(pixels, down, across, dtype)


def _bands(length: int, weights: np.ndarray, dtype: np.dtype[Any]) -> Iterator[Band]:
    radius = len(weights) // 2
    block = min(length, max(_BLOCK_PIXELS, radius))
    inner: np.ndarray | None = None  # all blocks that touch no border have the same weights
    for first in range(0, length, block):
        pixels = slice(first, min(first + block, length))
        seen = slice(max(first - radius, 0), min(pixels.stop + radius, length))
        if seen.stop - seen.start < block + 2 * radius:
            yield Band(pixels, seen, _band_weights(pixels, seen, length, weights).astype(dtype))
            continue
        if inner is None:
            inner = _band_weights(pixels, seen, length, weights).astype(dtype)
        yield Band(pixels, seen, inner)


def _band_weights(pixels: slice, seen: slice, length: int, weights: np.ndarray) -> np.ndarray:
    radius = len(weights) // 2
    targets = np.arange(pixels.start, pixels.stop)[:, np.newaxis]
    sources = (targets + np.arange(-radius, radius + 1)) % (2 * length)  # an image and its reflection, repeated
    sources = np.minimum(sources, 2 * length - 1 - sources)
    band = np.zeros((len(targets), seen.stop - seen.start))
    np.add.at(band, (targets - pixels.start, sources - seen.start), weights)
    return band


def _strips(pixels: np.ndarray) -> Iterator[slice]:
    height, width, channels = pixels.shape
    rows = max(1, _STRIP_ELEMENTS // (width * channels))
    return (slice(first, min(first + rows, height)) for first in range(0, height, rows))


def _sobel_strip(pixels: np.ndarray, strip: slice, out: np.ndarray) -> None:
    height, width, channels = pixels.shape
    # One more row and column on each side; the reflection at a border repeats the border pixel.
    around = np.clip(np.arange(strip.start - 1, strip.stop + 1), 0, height - 1)
    padded = np.empty((len(around), width + 2, channels), out.dtype)
    padded[:, 1:-1] = pixels[around]
    padded[:, 0] = padded[:, 1]
    padded[:, -1] = padded[:, -2]

    above, here, below = padded[:-2], padded[1:-1], padded[2:]
    smooth = above + here
    smooth += here
    smooth += below
    across = smooth[:, 2:] - smooth[:, :-2]

    step = below - above
    down = step[:, :-2] + step[:, 1:-1]
    down += step[:, 1:-1]
    down += step[:, 2:]
    _join(across, down, out)


def _join(across: np.ndarray, down: np.ndarray, out: np.ndarray) -> None:
    # `hypot` in double precision would take most of the filter's time, and is needed only where squares overflow. In
    # single precision it is fast, and squares would lose small gradients.
    if out.dtype == np.float64:
        np.sqrt(across * across + down * down, out=out)
        if math.isfinite(out.sum()):
            return
    np.hypot(across, down, out=out)
