"""Images as arrays, if Pillow is installed (`pip install 'unlatch[images]'`)."""

from typing import IO, Any

import numpy as np

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.tensors import Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")
# Pillow's modes whose arrays need no conversion.
_AS_IT_IS = ("L", "RGB", "RGBA", "LA", "I;16", "F")


def pillow(field: str) -> Any:
    """Pillow's Image module. Raises InvalidArgument if it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InvalidArgument(
            f"{field}: images need Pillow, which is not installed: pip install 'unlatch[images]'", field=field
        ) from None
    return Image


def read(path: str, field: str) -> Array:
    """Read an image as uint8 of shape (height, width) or (height, width, channels), upright; 16-bit grey as uint16.

    Raises InvalidArgument without Pillow, OSError for a file that is not an image.
    """
    image_module = pillow(field)
    from PIL import ImageOps

    try:
        with image_module.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode not in _AS_IT_IS:
                has_alpha = "transparency" in image.info
                image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
            return np.asarray(image)
    except (image_module.DecompressionBombError, SyntaxError) as error:
        raise OSError(f"{path}: {error}") from None


def write(file: IO[bytes], array: Array, suffix: str, field: str) -> None:
    """Write pixels. Raises InvalidArgument for a shape that no image has, OSError for what the format cannot hold.

    uint8 is written as it is, uint16 with two axes as 16 bits, bool as black and white. Floats that all lie between 0
    and 1 are brightness; other floats and integers are taken as 0 to 255, rounded and clipped, and NaN is black.
    """
    shown = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if not shown.size or not (shown.ndim == 2 or (shown.ndim == 3 and shown.shape[2] in (2, 3, 4))):
        wanted = "(height, width) or (height, width, 1 to 4)"
        raise InvalidArgument(f"{field}: wanted an image of shape {wanted}, got {array.shape}", field=field)
    image_module = pillow(field)
    formats = image_module.registered_extensions()
    image_module.fromarray(_pixels(shown, field)).save(file, formats[suffix])


def _pixels(array: Array, field: str) -> Array:
    if array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2):
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "biuf":
        raise InvalidArgument(f"{field}: wanted an image of real numbers, got {array.dtype}", field=field)
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    values = np.nan_to_num(array.astype(np.float64), nan=0.0)
    if array.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        values *= 255
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)
