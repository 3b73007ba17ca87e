"""Work for the fleet's figures: it takes time but no core, so that three replicas fit on any machine."""

import time

import numpy as np
from jaxtyping import Float64

from unlatch import kernel

SECONDS = 0.01


@kernel(pure=True)
def nap(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Occupy a worker for 10 ms."""
    time.sleep(SECONDS)
    return x
