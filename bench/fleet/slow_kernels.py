"""The same work, as on a machine that is four times slower."""

import time

import numpy as np
from jaxtyping import Float64

from bench.fleet.kernels import SECONDS
from unlatch import kernel


@kernel(pure=True)
def nap(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Occupy a worker for 40 ms."""
    time.sleep(4 * SECONDS)
    return x
