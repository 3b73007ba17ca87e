"""A kernel in C++: `unlatch serve --kernels native_kernels`.

Python declares it and refuses what makes no sense; the C++ (warping.cpp) does the work, without the interpreter lock.
"""

import numpy as np
from jaxtyping import Float64

from unlatch import KernelError, kernel

from ._warping import distances

# A cell takes four nanoseconds or so: the limit is some seconds on one core.
_MOST_CELLS = 1_000_000_000


@kernel(pure=True)
def warping_distance(
    rows: Float64[np.ndarray, "count n"], reference: Float64[np.ndarray, "m"]
) -> Float64[np.ndarray, "count"]:
    """How far each row is from a reference, when either may be stretched in time (dynamic time warping).

    `rows` has shape (count, n), `reference` (m,); both are finite and not empty. The result has shape (count,) and the
    unit of the inputs: the sum of |difference| along the best alignment. Raises `KernelError` for anything else, and
    for more than a billion cells (count * n * m).
    """
    cells = rows.size * reference.size
    if rows.shape[1] == 0 or reference.size == 0:
        raise KernelError(f"rows, reference: wanted series that are not empty, got {rows.shape} and {reference.shape}")
    if cells > _MOST_CELLS:
        raise KernelError(f"rows, reference: wanted at most {_MOST_CELLS} cells (count * n * m), got {cells}")
    for name, values in (("rows", rows), ("reference", reference)):
        if not np.isfinite(values).all():
            raise KernelError(f"{name}: wanted finite values")
    out = np.empty(len(rows))
    distances(rows, reference, out)
    return out
