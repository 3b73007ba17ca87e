"""The choice among a kernel's dtypes for a given array: only a dtype that holds every value exactly as it was meant.

An array that fits none is sent as it is. The server's error names the dtype and shape that it wanted.
"""

from typing import Any

import numpy as np

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.datatypes import OBJECT
from unlatch.common.kernel.spec import ArraySpec
from unlatch.common.kernel.tensors import Array, dtype_name

# Whole numbers beyond this may not be exact as float64.
_MAX_EXACT = 2**53


def typed(array: Array, wanted: ArraySpec) -> Array:
    """An array from a file with a dtype: kept as it is, or converted to a dtype that holds all values of its own."""
    if not wanted.dtypes or dtype_name(array) in wanted.dtypes:
        return array
    for dtype in wanted.dtypes:
        if dtype != OBJECT and np.can_cast(array.dtype, dtype, "safe") and _is_exact(array):
            return array.astype(dtype)
    return array


def untyped(values: Any, wanted: ArraySpec) -> Array:
    """Numbers or strings from a text, in the first of the kernel's dtypes that holds them.

    A number may lose digits as a float32; a whole number stays whole, and no value overflows. Raises InvalidArgument.
    """
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"{wanted.name}: {error}", field=wanted.name) from None
    if array.dtype.kind == "O":
        raise InvalidArgument(f"{wanted.name}: wanted an array of numbers or strings", field=wanted.name)
    if not wanted.dtypes or array.dtype.name in wanted.dtypes[:1]:
        return array
    for dtype in wanted.dtypes:
        cast = _cast(array, dtype)
        if cast is not None:
            return cast
    some = ", ".join(map(repr, array.reshape(-1)[:4].tolist())) + (", …" if array.size > 4 else "")
    raise InvalidArgument(
        f"{wanted.name}: wanted {' or '.join(wanted.dtypes)}, which cannot hold {some}",
        field=wanted.name,
    )


def _cast(array: Array, dtype: str) -> Array | None:
    target = np.dtype(object if dtype == OBJECT else dtype)
    if target.kind == "O":
        return array if array.dtype.kind == "U" else None
    if array.dtype.kind == "U" and target.kind not in "fc":
        return None
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            cast: Array = array.astype(target)
    except ValueError:
        return None
    return cast if array.dtype.kind == "U" or _holds(cast, array) else None


def _holds(cast: Array, array: Array) -> bool:
    if cast.dtype.kind in "fc":
        return _is_exact(array) and bool((np.isfinite(cast) | ~np.isfinite(array)).all())
    return bool((cast == array).all())


def _is_exact(array: Array) -> bool:
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 8 or not array.size:
        return True
    return bool(array.max() <= _MAX_EXACT and array.min() >= -_MAX_EXACT)
