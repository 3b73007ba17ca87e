"""Your own kernels: a module that Unlatch serves beside the built-in ones.

unlatch serve --kernels examples/own_kernels.py     # and from another shell
unlatch call escape_times c=@points.npy limit=500 -o steps.npy
python examples/mandelbrot.py                       # draws a picture with it
"""

import numpy as np
from jaxtyping import Complex128, Int32

from unlatch import KernelError, kernel

# One step of one point takes some nanoseconds, so the limit is seconds on one core.
_MAX_STEPS = 1_000_000_000


@kernel(pure=True)
def escape_times(c: Complex128[np.ndarray, "rows cols"], *, limit: int = 200) -> Int32[np.ndarray, "rows cols"]:
    """Count the steps of z * z + c, from 0, until each point leaves the circle of radius 2; at most `limit`."""
    if limit < 1 or c.size * limit > _MAX_STEPS:
        raise KernelError(f"limit: wanted 1 to {_MAX_STEPS} steps of all points together, got {limit} for {c.size}")
    steps = np.full(c.shape, limit, np.int32)
    inside = np.arange(c.size)  # points that have not left; only these are computed further
    points = c.ravel()
    z = np.zeros_like(points)
    for step in range(limit):
        z = z * z + points
        left = np.abs(z) > 2
        steps.flat[inside[left]] = step
        inside, points, z = inside[~left], points[~left], z[~left]
    return steps
