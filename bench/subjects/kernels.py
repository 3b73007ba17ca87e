"""The bench's work as Unlatch kernels: `unlatch serve --kernels bench/subjects/kernels.py`."""

import numpy as np
from jaxtyping import Float64, Shaped

from bench.subjects import work
from unlatch import KernelError, kernel

Vector = Float64[np.ndarray, "n"]
Rows = Float64[np.ndarray, "rows columns"]
# The start time, the processor time used, and the worker's pid.
Stamp = Float64[np.ndarray, "3"]

spin10 = kernel(pure=True)(work.spin10)
elementwise = kernel(pure=True)(work.elementwise)
python_loop = kernel(pure=True)(work.python_loop)
wait10 = kernel(pure=True)(work.wait10)
wait10_async = kernel(work.wait10_async)


# One kernel for each duration, since a kernel's run time is learned.


@kernel(pure=True)
def burns_0ms() -> Stamp:
    """Report that a worker has run this."""
    return work.burnt(0.0)


@kernel(pure=True)
def burns_1ms() -> Stamp:
    """Use 1 ms of processor time."""
    return work.burnt(1.0)


@kernel(pure=True)
def burns_4ms() -> Stamp:
    """Use 4 ms of processor time."""
    return work.burnt(4.0)


@kernel(pure=True)
def burns_10ms() -> Stamp:
    """Use 10 ms of processor time."""
    return work.burnt(10.0)


@kernel(pure=True)
def burns_20ms() -> Stamp:
    """Use 20 ms of processor time."""
    return work.burnt(20.0)


@kernel(pure=True)
def burns_500ms() -> Stamp:
    """Use 500 ms of processor time."""
    return work.burnt(500.0)


# The same work, one call at a time and as a batch.


@kernel(pure=True)
def costly_alone(x: Rows) -> Rows:
    """`work.costly`, with one call in each run."""
    return work.costly(x)


@kernel(pure=True, batch=True)
def costly_together(x: Rows) -> Rows:
    """`work.costly`, with many calls in each run."""
    return work.costly(x)


@kernel(pure=True)
def light_alone(x: Rows) -> Rows:
    """`work.light`, with one call in each run."""
    return work.light(x)


@kernel(pure=True, batch=True)
def light_together(x: Rows) -> Rows:
    """`work.light`, with many calls in each run."""
    return work.light(x)


# Further kernels of the soak: of each kind one that may be run again and one that may not.


@kernel(pure=True)
def doubled(x: Vector) -> Vector:
    """Double a vector."""
    return x * 2.0


@kernel
def negated(x: Vector) -> Vector:
    """Negate a vector, by a kernel that is not pure."""
    return -x


@kernel(pure=True)
def doubled_slowly(x: Vector) -> Vector:
    """Double a vector, using 50 ms of processor time."""
    work.burnt(50.0)
    return x * 2.0


@kernel
def negated_slowly(x: Vector) -> Vector:
    """Negate a vector, using 50 ms of processor time."""
    work.burnt(50.0)
    return -x


@kernel(pure=True)
def reversed_any(x: Shaped[np.ndarray, "n"]) -> Shaped[np.ndarray, "n"]:
    """Reverse a vector of any dtype."""
    return x[::-1]


@kernel
def refused(x: Vector) -> Vector:
    """Refuse every vector."""
    raise KernelError(f"the first value is {x[0]!r}")
