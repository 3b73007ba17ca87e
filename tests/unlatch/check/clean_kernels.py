"""Kernels in which `unlatch check` finds nothing."""

import asyncio
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Float64, Int64, Shaped, UInt8

from unlatch import kernel


class Range(NamedTuple):
    """Two outputs by name."""

    low: Float64[np.ndarray, "cols"]
    high: Float64[np.ndarray, "cols"]


@kernel(pure=True, batch=True)
def normalise(x: Float64[np.ndarray, "rows cols"], *, eps: float = 1e-9) -> Float64[np.ndarray, "rows cols"]:
    return np.asarray(x / (np.linalg.norm(x, axis=1, keepdims=True) + eps))


@kernel(pure=True)
def ranges(x: Float64[np.ndarray, "rows cols"]) -> Range:
    return Range(x.min(axis=0, initial=np.inf), x.max(axis=0, initial=-np.inf))


@kernel(pure=True)
def several_dtypes(x: Float[np.ndarray, "*batch n"]) -> Complex[np.ndarray, "*batch n"]:
    double = x.dtype == np.float64
    return x.astype(np.complex128 if double else np.complex64)


@kernel(pure=True)
def anything(x: Shaped[np.ndarray, "..."]) -> Int64[np.ndarray, ""]:
    return np.array(x.size)


@kernel(pure=True)
def brightest(pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
    return np.asarray(pixels.max(axis=2))


@kernel(pure=True)
def apart(x: Float64[np.ndarray, "_"], y: Float64[np.ndarray, "_"]) -> Int64[np.ndarray, ""]:
    return np.array(len(x) - len(y))


@kernel(pure=True)
def scalars_alone(*, flag: bool, count: int, ratio: float, label: str) -> Shaped[np.ndarray, "count"]:
    return np.array([f"{flag} {ratio} {label}"] * count)


@kernel
def random_and_says_so(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x + np.random.default_rng().standard_normal(len(x))


@kernel(pure=True)
def cubic(a: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
    return np.asarray(a @ a)


@kernel(pure=True)
def many_axes(x: Float64[np.ndarray, "a b c d e f g h"]) -> Float64[np.ndarray, ""]:
    return np.asarray(x.sum())


@kernel(pure=True)
async def waited(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    await asyncio.sleep(0.001)
    return x * 2.0
