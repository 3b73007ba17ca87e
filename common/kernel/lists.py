"""Lists of scalars as JSON, the form in which a parameter of the Open Inference Protocol carries them.

The protocol's parameters are scalars only (docs/decisions/0031). JSON has no NaN and no infinity: these are written as
strings, as in protobuf's JSON, and also read as the bare words that Python's `json` writes.
"""

import json
from collections.abc import Iterable
from math import isfinite, isinf, isnan
from typing import Any

from unlatch.common.errors import shown
from unlatch.common.kernel.numbers import number

# A scalar as plain data.
Value = bool | int | float | str


def to_json(values: Iterable[Value]) -> str:
    """Write a list. Raises TypeError for an element that is no scalar."""
    return json.dumps(list(map(_plain, values)), ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> list[Any]:
    """Read a list of anything. Raises ValueError for what is no JSON list, or a number or text that cannot be kept."""
    try:
        found = json.loads(text)
        # An infinity may be a number that no float holds, which only the slower reading tells apart.
        if isinstance(found, list) and any(type(one) is float and isinf(one) for one in found):
            found = json.loads(text, parse_float=number)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"got {shown(text)}")  # noqa: TRY004 (the text is at fault, not its type)
    for index, element in enumerate(found):
        if isinstance(element, str):
            try:
                element.encode()
            except UnicodeEncodeError:
                raise ValueError(f"element {index} cannot be encoded in UTF-8") from None
    return found


def _plain(value: Value) -> Value:
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if not isinstance(value, Value):
        raise TypeError(f"wanted a list of bool, int, float or str, got the type {type(value).__name__} in it")
    return value
