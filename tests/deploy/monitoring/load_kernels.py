"""Kernels for a load: they take a given time, alone or together, and fail in the ways that kernels fail."""

import time

import numpy as np
from jaxtyping import Float64

from unlatch import KernelError, kernel

Vector = Float64[np.ndarray, "n"]
Rows = Float64[np.ndarray, "rows n"]


@kernel(pure=True)
def simulate(x: Vector, *, seconds: float) -> Vector:
    """Return twice `x`, after that much processor time."""
    _compute(seconds)
    return x * 2.0


@kernel
def record(x: Vector, *, seconds: float) -> Vector:
    """Do the same in a kernel that is not declared pure."""
    _compute(seconds)
    return x * 2.0


@kernel(pure=True, batch=True, max_batch_size=16)
def score(x: Rows) -> Rows:
    """Return twice each row. Calls of this kernel may run as one."""
    _compute(0.002)
    return x * 2.0


@kernel
def refuse(x: Vector) -> Vector:
    """Raise an error that the caller is meant to see."""
    raise KernelError("there are limits")


@kernel
def fail(x: Vector) -> Vector:
    """Raise an error that the caller must not see."""
    raise ValueError("a fault of the kernel's")


def _compute(seconds: float) -> None:
    end, x = time.process_time() + seconds, np.linspace(0.0, 1.0, 4096)
    while time.process_time() < end:
        x = np.sqrt(x * x + 1.0) % 1.0
