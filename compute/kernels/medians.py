"""The median filter.

For small windows, a network of exchanges sorts the pixels of all windows at once, each exchange being one `minimum` and
one `maximum` over a tile of the image. For larger ones, windows are copied and partitioned one by one.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Real

from unlatch import kernel
from unlatch.compute.kernels.precision import image_dtype
from unlatch.compute.kernels.refusals import require_odd, require_work

_MAX_SIZE = 31

# Up to 5 nanoseconds for each: about a minute and a half at the limit.
_MAX_WINDOW_PIXELS = 20_000_000_000

# A window of n pixels costs 3/4 n**2 passes over vectors. Narrow pixels allow more, since a vector holds more of them.
_MAX_NETWORK_PIXELS = {1: 81, 2: 49, 4: 49, 8: 25}

# A tile of the network's planes stays in the cache, and so do the windows to partition.
_TILE_BYTES = 16_384
_WINDOWS_BYTES = 1_048_576


@kernel(pure=True)
def median_filter(image: Real[np.ndarray, "h w *channels"], *, size: int = 3) -> Real[np.ndarray, "h w *channels"]:
    """Compute the median of the square of `size` pixels around each pixel: it removes specks and keeps edges.

    `image` has shape (h, w) or (h, w, channels) and holds floats or 8- or 16-bit integers; the result has its shape and
    dtype, and treats each channel by itself. The image is reflected at its borders (d c b a | a b c d). A NaN fills the
    square around it.

    Raises `KernelError` for other dtypes, for a size that is not odd and positive, for a size above 31, and for pixels
    (of all channels) times size squared above 2 * 10**10. Source: A. Paeth, "Median Finding on a 3x3 Grid", Graphics
    Gems (1990), for any size (`scipy.ndimage.median_filter`).
    """
    image_dtype(image)
    require_odd("size", size)
    require_work("size", "a square with a side", size, _MAX_SIZE)
    require_work("size", "pixels times size squared", image.size * size**2, _MAX_WINDOW_PIXELS)
    if image.size == 0 or size == 1:
        return image
    pixels = image.reshape(*image.shape[:2], -1)
    radius = size // 2
    padded = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    filtered = np.empty_like(pixels)
    fill = _by_network if size**2 <= _MAX_NETWORK_PIXELS[image.itemsize] else _by_partition
    with np.errstate(invalid="ignore"):
        fill(padded, size, filtered)
    return filtered.reshape(image.shape)


def _tiles(out: np.ndarray, pixel_bytes: int, tile_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Split the result into tiles of at most `tile_bytes`, as rows and columns; as long in rows as possible."""
    height, width = out.shape[:2]
    columns = min(width, max(1, tile_bytes // pixel_bytes))
    rows = max(1, tile_bytes // (pixel_bytes * columns))
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, top + rows), slice(left, left + columns)


def _windows(padded: np.ndarray, rows: slice, columns: slice, size: int) -> np.ndarray:
    around = padded[rows.start : rows.stop + size - 1, columns.start : columns.stop + size - 1]
    return np.lib.stride_tricks.sliding_window_view(around, (size, size), (0, 1))


def _by_network(padded: np.ndarray, size: int, out: np.ndarray) -> None:
    for rows, columns in _tiles(out, out[0, 0].nbytes, _TILE_BYTES):
        out[rows, columns] = _median(_windows(padded, rows, columns, size))


def _median(windows: np.ndarray) -> np.ndarray:
    """Find the median by elimination: among slightly more than half of the pixels, neither extreme is the median.

    The smallest and the largest are dropped, one more pixel is added, and so on until one is left.
    """
    size = windows.shape[-1]
    planes = (windows[..., row, column] for row in range(size) for column in range(size))
    held = [next(planes).copy() for _ in range(size**2 // 2 + 2)]
    spare = np.empty_like(held[0])

    def order(low: int, high: int) -> None:
        nonlocal spare
        np.minimum(held[low], held[high], out=spare)
        np.maximum(held[low], held[high], out=held[high])
        held[low], spare = spare, held[low]

    while True:
        last = len(held) - 1
        for low in range(len(held) // 2):
            order(low, last - low)
        for low in range(1, (last + 2) // 2):
            order(0, low)
        for high in range((last + 1) // 2, last):
            order(high, last)
        incoming = held.pop()
        plane = next(planes, None)
        if plane is None:
            return held[1]
        np.copyto(incoming, plane)
        held[0] = incoming


def _by_partition(padded: np.ndarray, size: int, out: np.ndarray) -> None:
    pixels = size**2
    for rows, columns in _tiles(out, out[0, 0].nbytes * pixels, _WINDOWS_BYTES):
        windows = _windows(padded, rows, columns, size)
        flat = windows.reshape(*windows.shape[:3], pixels)
        if flat.itemsize == 1:
            flat = flat.astype(np.int16)  # NumPy partitions bytes several times slower
        middle = np.partition(flat, pixels // 2, axis=-1)[..., pixels // 2]
        if out.dtype.kind == "f":
            middle[np.isnan(flat).any(axis=-1)] = np.nan
        out[rows, columns] = middle
