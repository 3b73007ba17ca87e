"""Checks that built-in kernels share, with their error texts: values without meaning, and work out of proportion.

A small request must not cause hours of work or gigabytes of memory. If a kernel's work can grow faster than its arrays,
one call of `require_work` names the quantity and its limit, which is what one core does in about a minute at worst. If
its result can, `require_result_bytes` keeps the result in proportion to the arguments.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from unlatch import KernelError

# A result may be this large for any arguments; a larger one must be in proportion to them. An outer product of two 8 MB
# vectors would have 8 TB, and two arrays of shapes (10**6, 0) and (0, 10**6) have no bytes at all.
_FREE_RESULT_BYTES = 64 * 2**20
_RESULT_PER_ARGUMENT_BYTE = 16


def require_work(argument: str, what: str, amount: float, limit: int) -> None:
    """Refuse more work than a call may cause. `what` names the quantity with which it grows, in a caller's words."""
    if amount > limit:
        raise KernelError(f"{argument}: wanted {what} of at most {limit}, got {amount}")


def require_result_bytes(argument: str, shape: tuple[int, ...], dtype: np.dtype[Any], arguments_bytes: int) -> None:
    """Refuse a result of more than 64 MiB that is also more than 16 times its arguments."""
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
    """Refuse a window without a middle."""
    if value < 1 or value % 2 == 0:
        raise KernelError(f"{argument}: wanted an odd number of at least 1, got {value}")


def require_choice(argument: str, value: str, choices: Collection[str]) -> None:
    """Refuse a word that is not one of the choices."""
    if value not in choices:
        wanted = " or ".join(f'"{choice}"' for choice in choices)
        raise KernelError(f'{argument}: wanted {wanted}, got "{value}"')


def require_finite(argument: str, x: np.ndarray) -> None:
    """Refuse NaN and infinities. The error has the first one and its place."""
    finite = np.isfinite(x)
    if not finite.all():
        place = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise KernelError(f"{argument}: wanted finite elements, got {x[place]} at {list(place)}")
