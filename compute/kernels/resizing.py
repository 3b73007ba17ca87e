"""Images in another size."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Real

from unlatch import KernelError, kernel
from unlatch.compute.kernels.bands import Band, filtered
from unlatch.compute.kernels.precision import image_dtype
from unlatch.compute.kernels.refusals import require_between, require_choice, require_result_bytes

_MAX_SIDE_PIXELS = 65_536

# With fewer output pixels a band wastes the overhead of BLAS; with more it multiplies zeros.
_MIN_BLOCK_PIXELS = 8
_MAX_BLOCK_PIXELS = 32
_SEEN_PIXELS = 48


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(1 - np.abs(x), 0))


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


# How far each filter reaches, in pixels of the larger image's scale.
_FILTERS = {"bilinear": (1, _triangle), "bicubic": (2, _cubic), "lanczos": (3, _lanczos)}


@kernel(pure=True)
def resize(
    image: Real[np.ndarray, "h w *channels"], *, height: int, width: int, method: str = "bilinear"
) -> Real[np.ndarray, "height width *channels"]:
    """Resize an image, with antialiasing where it shrinks.

    `image` has shape (h, w) or (h, w, channels) and holds floats or 8- or 16-bit integers; the result has shape
    (height, width) or (height, width, channels) and its dtype, integers rounded to the nearest and clipped to their
    range. `method` is "bilinear", "bicubic" or "lanczos" (with three lobes); "bicubic" and "lanczos" may overshoot at
    edges. A NaN or an infinity gives NaN in the pixels that depend on it, and in no others.

    Raises `KernelError` for other dtypes, for a height or width outside 1 to 65536, for another method, for an image
    without pixels, and when the result would be larger than 64 MiB and than 16 times the image. Source: R. Keys,
    "Cubic Convolution Interpolation for Digital Image Processing", IEEE Trans. ASSP 29 (1981); Pillow's
    `Image.resize`, whose integers are rounded after each axis.
    """
    dtype = image_dtype(image)
    require_choice("method", method, _FILTERS)
    require_between("height", height, 1, _MAX_SIDE_PIXELS)
    require_between("width", width, 1, _MAX_SIDE_PIXELS)
    shape = (height, width, *image.shape[2:])
    require_result_bytes("height, width", shape, image.dtype, image.nbytes)
    if 0 in image.shape[:2]:
        raise KernelError(f"image: wanted pixels, got shape {image.shape}")
    if image.size == 0:
        return np.empty(shape, image.dtype)
    down, across = (list(_bands(*sides, method, dtype)) for sides in zip(image.shape[:2], (height, width), strict=True))
    pixels = image.reshape(*image.shape[:2], -1).astype(dtype, copy=False)
    return _resized(pixels, down, across, image.dtype).reshape(shape)


def _resized(pixels: np.ndarray, down: list[Band], across: list[Band], dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        bad = None if dtype.kind in "iu" or np.isfinite(pixels.sum()) else ~np.isfinite(pixels)
        if bad is None or not bad.any():
            return filtered(pixels, down, across, dtype)
        # Zero times NaN is NaN, and in a matrix product it would spread over its whole block.
        resized = filtered(np.where(bad, 0, pixels), down, across, dtype)
        wide_down, wide_across = (
            [band._replace(weights=np.abs(band.weights)) for band in bands] for bands in (down, across)
        )
        resized[filtered(bad.astype(pixels.dtype), wide_down, wide_across, pixels.dtype) > 0] = np.nan
    return resized


def _bands(before: int, after: int, method: str, dtype: np.dtype[Any]) -> Iterator[Band]:
    reach, weigh = _FILTERS[method]
    scale = before / after
    stretch = max(scale, 1.0)  # a filter as wide as an output pixel removes finer detail
    # If a single output pixel depends on many, larger bands would take more memory than the image.
    least = _MIN_BLOCK_PIXELS if scale <= _SEEN_PIXELS else 1
    block = min(max(math.ceil(_SEEN_PIXELS / scale), least), _MAX_BLOCK_PIXELS)
    for first in range(0, after, block):
        pixels = slice(first, min(first + block, after))
        centers = (np.arange(pixels.start, pixels.stop) + 0.5) * scale
        seen = slice(
            max(math.floor(centers[0] - reach * stretch), 0), min(math.ceil(centers[-1] + reach * stretch), before)
        )
        weights = weigh((np.arange(seen.start, seen.stop) + 0.5 - centers[:, np.newaxis]) / stretch)
        weights /= weights.sum(axis=1, keepdims=True)
        yield Band(pixels, seen, weights.astype(dtype))
