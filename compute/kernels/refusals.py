"""What built-in kernels refuse, and in which words: values that mean nothing, and work out of proportion.

A small request must not ask for hours or gigabytes. Where a kernel's work can grow faster than its arrays, it says of
what and up to where in one call of `require_work`: the limit is what one core does in about a minute at worst. Where
its result can, `require_result_bytes` holds the result in proportion to the arguments.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from unlatch import KernelError

# A result may be this large whatever the arguments are; beyond it, only in proportion to them. An outer product of two
# 8 MB vectors would be 8 TB, and two arrays of shapes (10**6, 0) and (0, 10**6) have no bytes at all.
_FREE_RESULT_BYTES = 64 * 2**20
_RESULT_PER_ARGUMENT_BYTE = 16


def require_work(argument: str, what: str, amount: float, limit: int) -> None:
    """Refuse more work than a call may ask for. `what` is the quantity that it grows with, as a caller would say it."""
    if amount > limit:
        raise KernelError(f"{argument}: wanted {what} of at most {limit}, got {amount}")


def require_result_bytes(argument: str, shape: tuple[int, ...], dtype: np.dtype[Any], arguments_bytes: int) -> None:
    """Refuse a result above 64 MiB that is also above 16 times its arguments."""
    wanted = math.prod(shape) * dtype.itemsize
    allowed = max(_FREE_RESULT_BYTES, _RESULT_PER_ARGUMENT_BYTE * arguments_bytes)
    if wanted > allowed:
        raise KernelError(
            f"{argument}: wanted a result of at most {allowed} bytes for arguments of this size, "
            f"got a request for {wanted}: shape {shape}"
        )


def require_between(argument: str, value: float, least: float, most: float) -> None:
    """Refuse a number outside a closed interval; NaN is outside."""
    if not least <= value <= most:
        raise KernelError(f"{argument}: wanted {least} to {most}, got {value}")


def require_at_least(argument: str, value: float, least: float) -> None:
    """Refuse a number that is too small, infinite or NaN."""
    if not (math.isfinite(value) and value >= least):
        raise KernelError(f"{argument}: wanted a finite number of at least {least}, got {value}")


def require_odd(argument: str, value: int) -> None:
    """Refuse a window that has no middle."""
    if value < 1 or value % 2 == 0:
        raise KernelError(f"{argument}: wanted an odd number of at least 1, got {value}")


def require_choice(argument: str, value: str, choices: Collection[str]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        raise KernelError(f'{argument}: wanted {wanted}, got "{value}"')


def require_finite(argument: str, x: np.ndarray) -> None:
    """Refuse NaN and infinities, naming the first and its place."""
    finite = np.isfinite(x)
    if not finite.all():
        place = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise KernelError(f"{argument}: wanted finite elements, got {x[place]} at {list(place)}")
