"""A kernel in C++: `unlatch serve --kernels native_kernels`.

Python declares it and checks its arguments. The C++ code (warping.cpp) does the work, without the interpreter lock.
"""

import numpy as np
from jaxtyping import Float64

from unlatch import KernelError, kernel

from ._warping import distances

# A cell takes about four nanoseconds, so the limit is some seconds on one core.
_MAX_CELLS = 1_000_000_000


@kernel(pure=True)
def warping_distance(
    rows: Float64[np.ndarray, "count n"], reference: Float64[np.ndarray, "m"]
) -> Float64[np.ndarray, "count"]:
    """Measure the distance of each row from a reference, by dynamic time warping: either may be stretched in time.

    `rows` has shape (count, n), `reference` (m,); both are finite and not empty. The result has shape (count,) and the
    unit of the inputs: the sum of |difference| along the best alignment. Raises `KernelError` for anything else, and
    for more than a billion cells (count * n * m).
    """
    cells = rows.size * reference.size
    if rows.shape[1] == 0 or reference.size == 0:
        raise KernelError(f"rows, reference: wanted series that are not empty, got {rows.shape} and {reference.shape}")
    if cells > _MAX_CELLS:
        raise KernelError(f"rows, reference: wanted at most {_MAX_CELLS} cells (count * n * m), got {cells}")
    for name, values in (("rows", rows), ("reference", reference)):
        if not np.isfinite(values).all():
            raise KernelError(f"{name}: wanted finite values")
    out = np.empty(len(rows))
    distances(rows, reference, out)
    return out
