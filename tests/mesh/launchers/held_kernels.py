"""Kernels that hold a worker until a test opens their gate."""

import os

import numpy as np
from jaxtyping import Int64

from unlatch import kernel


def _hold(gate: str) -> Int64[np.ndarray, ""]:
    with open(gate, "rb") as opened:
        opened.read()
    return np.array(os.getppid())


@kernel(pure=True)
def holds_pure(*, gate: str) -> Int64[np.ndarray, ""]:
    """Hold a worker. The call may run again."""
    return _hold(gate)


@kernel
def holds_once(*, gate: str) -> Int64[np.ndarray, ""]:
    """Hold a worker. The call may not run again."""
    return _hold(gate)
