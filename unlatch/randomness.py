"""Random numbers in kernels: a stream of its own for each process."""

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.random import Generator


def rng() -> "Generator":
    """Return the random number generator of this process, seeded by the system.

    Each worker, each replacement of a worker, and each process that a kernel starts has another stream of numbers. For
    numbers that can be drawn again, take a seed as a scalar, and draw from `np.random.default_rng(seed)`.
    """
    return _generator(os.getpid())


@cache
def _generator(_pid: int) -> "Generator":
    from numpy.random import default_rng

    return default_rng()
