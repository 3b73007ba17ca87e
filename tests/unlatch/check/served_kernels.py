"""Kernels that a service runs well although much about them is unusual: `unlatch check` must find no fault."""

import multiprocessing
from itertools import count

import numpy as np
from jaxtyping import Float64, Int64

from unlatch import Bytes, kernel, rng

# Drawn from at import only.
generator = np.random.default_rng(0)
points = generator.standard_normal((50, 3))
turns = count()


def half(value: float) -> float:
    """A function that other processes find by its module."""
    return value / 2


@kernel(pure=True)
def halves(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    with multiprocessing.Pool(2) as pool:
        return np.array(pool.map(half, x), dtype=float)


@kernel(pure=True, nonempty=True)
def predicts(x: Float64[np.ndarray, "rows 3"]) -> Float64[np.ndarray, "rows"]:
    """Refuse arrays without rows, as scikit-learn does."""
    if not len(x):
        raise ValueError("Found array with 0 sample(s)")
    return np.asarray(x @ points[0])


@kernel(pure=True)
def letters(x: Bytes[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    return np.array([len(text.decode()) for text in x.tolist()], dtype=int)


@kernel(pure=True)
def sums(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, ""]:
    """Add in another order each time, as threads do."""
    return np.asarray(sum(np.roll(x, next(turns)).tolist(), 0.0))


@kernel
def noisy(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x + rng().standard_normal(len(x)) + np.random.random()  # noqa: NPY002 (the global state is seeded)
