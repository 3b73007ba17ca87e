"""Morphology of images: the smallest and largest value around each pixel."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

from unlatch import KernelError, kernel
from unlatch.compute.kernels.refusals import require_odd
from unlatch.compute.kernels.windows import extremes


@kernel(pure=True)
def erode(image: Shaped[np.ndarray, "h w *channels"], *, size: int = 3) -> Shaped[np.ndarray, "h w *channels"]:
    """Compute the smallest value in the square of `size` pixels around each pixel: bright shapes shrink.

    `image` has shape (h, w) or (h, w, channels) and holds bools, integers or floats; the result has its shape and
    dtype, and treats each channel by itself. At borders the square is cut to the image. The time grows with the
    logarithm of `size`. A NaN fills the square around it.

    Raises `KernelError` for other dtypes and for a size that is not odd and positive. Source:
    `scipy.ndimage.grey_erosion`.
    """
    return _around(_image(image, size), size, np.minimum)


@kernel(pure=True)
def dilate(image: Shaped[np.ndarray, "h w *channels"], *, size: int = 3) -> Shaped[np.ndarray, "h w *channels"]:
    """Compute the largest value in the square of `size` pixels around each pixel: bright shapes grow.

    Shapes, dtypes, borders, NaN and errors are those of `erode`. Source: `scipy.ndimage.grey_dilation`.
    """
    return _around(_image(image, size), size, np.maximum)


@kernel(pure=True)
def opening(image: Shaped[np.ndarray, "h w *channels"], *, size: int = 3) -> Shaped[np.ndarray, "h w *channels"]:
    """Erode an image, then dilate it: bright shapes that hold no square of `size` pixels disappear.

    Shapes, dtypes, borders and errors are those of `erode`; a NaN fills a square twice as large. Source:
    `scipy.ndimage.grey_opening`.
    """
    return _around(_around(_image(image, size), size, np.minimum), size, np.maximum)


@kernel(pure=True)
def closing(image: Shaped[np.ndarray, "h w *channels"], *, size: int = 3) -> Shaped[np.ndarray, "h w *channels"]:
    """Dilate an image, then erode it: dark gaps that hold no square of `size` pixels disappear.

    Shapes, dtypes, borders and errors are those of `erode`; a NaN fills a square twice as large. Source:
    `scipy.ndimage.grey_closing`.
    """
    return _around(_around(_image(image, size), size, np.maximum), size, np.minimum)


def _image(image: np.ndarray, size: int) -> np.ndarray:
    require_odd("size", size)
    if image.dtype.kind not in "biuf":
        raise KernelError(f"image: wanted bools, integers or floats, got {image.dtype}")
    return image


def _around(image: np.ndarray, size: int, extreme: np.ufunc) -> np.ndarray:
    if image.size == 0 or size == 1:
        return image
    return _along(_along(image, size // 2, extreme, 0), size // 2, extreme, 1)


def _along(image: np.ndarray, radius: int, extreme: np.ufunc, axis: int) -> np.ndarray:
    """The extreme of each pixel and its `radius` neighbours on both sides."""
    radius = min(radius, image.shape[axis] - 1)
    # The border's pixel is in every window that reaches beyond it, so repeating it changes nothing.
    pads: list[Any] = [(0, 0)] * image.ndim
    pads[axis] = (radius, radius)
    return extremes(np.pad(image, pads, mode="edge"), 2 * radius + 1, extreme, axis)
