"""In which precision the built-in kernels compute."""

from typing import Any

import numpy as np

from unlatch import KernelError


def working_dtype(*arrays: np.ndarray) -> np.dtype[Any]:
    """The dtype in which to compute with arrays, and to give the result.

    The common dtype of inexact arrays, float16 becoming float32 (BLAS and LAPACK have no such type); float64 for
    integers and bools.
    """
    common = np.result_type(*arrays)
    if common.kind not in "fc":
        return np.dtype(np.float64)
    return np.dtype(np.float32) if common == np.float16 else common


def real_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a complex dtype's parts; a real one's own."""
    return np.empty(0, dtype).real.dtype


def image_dtype(image: np.ndarray) -> np.dtype[Any]:
    """The dtype in which to filter an image. Raises `KernelError` for one that is no image's."""
    if image.dtype == np.float64:
        return image.dtype
    # In single precision the sums of 16-bit integers still round to the right integer; those of wider ones would not.
    if image.dtype.kind == "f" or (image.dtype.kind in "iu" and image.dtype.itemsize <= 2):
        return np.dtype(np.float32)
    raise KernelError(f"image: wanted floats or 8- or 16-bit integers, got {image.dtype}")


def column_means(x: np.ndarray) -> np.ndarray:
    """The mean of every column of inexact numbers: BLAS sums in parts, and rounds less than one sum after another."""
    means: np.ndarray = np.full(len(x), 1 / len(x), x.dtype) @ x
    return means
