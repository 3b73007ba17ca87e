"""Kernels of every form of signature, in which `unlatch check` finds the faults of the last three only."""

import enum
from typing import Literal

import numpy as np
from jaxtyping import Float64

from unlatch import Str, kernel


@kernel(pure=True, batch=True)
def weighted(
    x: Float64[np.ndarray, "rows n"],
    weights: Float64[np.ndarray, "rows"] | None = None,
    names: Str[np.ndarray, "rows"] | None = None,
) -> Float64[np.ndarray, "rows"]:
    total = x.sum(axis=1)
    if names is not None:
        total = total + np.array([len(name) for name in names], dtype=float)
    return np.asarray(total if weights is None else total * weights)


class Side(enum.Enum):
    """Choices that a kernel gets as members."""

    LEFT = "left"
    RIGHT = "right"


@kernel(pure=True)
def choices_and_lists(
    x: Float64[np.ndarray, "n"],
    *,
    side: Side,
    order: Literal[1, 2] = 1,
    shifts: list[float],
    tags: tuple[str, ...] = (),
) -> Float64[np.ndarray, "n"]:
    assert side in Side
    assert order in (1, 2)
    return x + sum(shifts) + len(" ".join(tags))


@kernel
def raises_without_scale(
    x: Float64[np.ndarray, "n"], scale: Float64[np.ndarray, "n"] | None = None
) -> Float64[np.ndarray, "n"]:
    return np.asarray(x * scale)


@kernel
def raises_for_a_choice(x: Float64[np.ndarray, "n"], *, side: Side = Side.LEFT) -> Float64[np.ndarray, "n"]:
    return x * {Side.LEFT: 1.0}[side]


@kernel
def raises_for_an_empty_list(x: Float64[np.ndarray, "n"], *, shifts: list[float]) -> Float64[np.ndarray, "n"]:
    return x + shifts[0]
