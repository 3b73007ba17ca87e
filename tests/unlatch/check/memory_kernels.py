"""Kernels that need a known amount of memory."""

import numpy as np
from jaxtyping import Float64

from unlatch import kernel

Vector = Float64[np.ndarray, "n"]


@kernel(pure=True)
def no_temporary(x: Vector) -> Float64[np.ndarray, ""]:
    return np.asarray(x.sum())


@kernel(pure=True)
def one_temporary(x: Vector) -> Float64[np.ndarray, ""]:
    return np.asarray((x * 2).sum())


@kernel(pure=True)
def three_at_once(x: Vector) -> Float64[np.ndarray, ""]:
    one, two, three = x + 1, x + 2, x + 3
    return np.asarray(one.sum() + two.sum() + three.sum())
