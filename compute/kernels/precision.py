"""The precision in which built-in kernels compute."""

from typing import Any

import numpy as np

from unlatch import KernelError


def working_dtype(*arrays: np.ndarray) -> np.dtype[Any]:
    """The dtype in which to compute with arrays and to return the result.

    For inexact arrays their common dtype, with float32 instead of float16 (which BLAS and LAPACK lack); for integers
    and bools float64.
    """
    common = np.result_type(*arrays)
    if common.kind not in "fc":
        return np.dtype(np.float64)
    return np.dtype(np.float32) if common == np.float16 else common


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a complex dtype's parts; for a real dtype the dtype itself."""
    return np.empty(0, dtype).real.dtype


def image_dtype(image: np.ndarray) -> np.dtype[Any]:
    """The dtype in which to filter an image. Raises `KernelError` for a dtype that no image has."""
    if image.dtype == np.float64:
        return image.dtype
    # In single precision, sums of 16-bit integers still round to the right integer; those of wider ones would not.
    if image.dtype.kind == "f" or (image.dtype.kind in "iu" and image.dtype.itemsize <= 2):
        return np.dtype(np.float32)
    raise KernelError(f"image: wanted floats or 8- or 16-bit integers, got {image.dtype}")


def column_means(x: np.ndarray) -> np.ndarray:
    """The mean of every column of inexact numbers. BLAS sums in parts, and so rounds less than a running sum."""
    means: np.ndarray = np.full(len(x), 1 / len(x), x.dtype) @ x
    return means
