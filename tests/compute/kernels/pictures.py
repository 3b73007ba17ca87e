"""Random images, and filters of one channel applied to many."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

Image = np.ndarray[Any, Any]

DTYPES = ["u1", "u2", "i1", "i2", "f2", "f4", "f8"]

shapes = st.one_of(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6)),
)


def random_image(seed: int, shape: tuple[int, ...], dtype: str) -> Image:
    """Make a read-only image of noise: over a dtype's whole range for integers, -100 to 100 for floats."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "b":
        image = random.random(shape) < 0.5
    elif np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        image = random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    else:
        image = random.uniform(-100, 100, shape).astype(dtype)
    image.setflags(write=False)
    return image


def by_channel(filtered: Callable[[Image], Image], image: Image) -> Image:
    """Apply a filter of two axes to each channel by itself."""
    if image.ndim == 2:
        return filtered(image)
    return np.stack([filtered(image[..., channel]) for channel in range(image.shape[2])], axis=2)
