"""Numbers that users write as text: each is read as it is, or refused."""

import re
from cmath import isinf, isnan
from contextlib import suppress
from typing import Any

from unlatch.common.errors import shown

_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")


def number(text: str) -> int | float | complex:
    """Read a number; a whole number keeps all its digits. Raises ValueError, or OverflowError for one like 1e400."""
    # Python reads no whole number of over 4,300 digits.
    with suppress(ValueError):
        if _WHOLE.fullmatch(text):
            return int(text)
        if "_" not in text:
            value = complex(text) if "j" in text.lower() else float(text)
            if isinf(value) and "inf" not in text.lower():
                raise OverflowError(f"float64 cannot hold {shown(text)}")
            return value
    raise ValueError(f"could not convert string {shown(text)} to a number")


def real(text: str) -> float:
    """Read a number as a float. Raises ValueError, or OverflowError for a number that a float would change."""
    value: Any = number(text)
    with suppress(TypeError, OverflowError):
        as_float = float(value)
        if as_float == value or isnan(value):
            return as_float
    raise OverflowError(f"float64 cannot hold {shown(text)}")
