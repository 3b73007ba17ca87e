"""Conversion of a caller's values to arrays of the dtypes that a kernel takes: exactly, or not at all.

An array has a dtype. If the kernel does not take it, the array gets the first of the kernel's dtypes that holds all
values of its own dtype. Lists, numbers and texts have no dtype: they get the first of the kernel's that holds them.
A fraction may lose digits in a narrower float; whole numbers stay exact, and nothing overflows.
"""

from cmath import isfinite
from typing import Any

import numpy as np

from unlatch.common.errors import InvalidArgument, shown
from unlatch.common.kernel.datatypes import OBJECT
from unlatch.common.kernel.numbers import number
from unlatch.common.kernel.spec import ArraySpec
from unlatch.common.kernel.tensors import Array, dtype_name

# A float64 of this size or more may stand for several whole numbers.
_MAX_EXACT = 2**53
_TEXTS = (str, bytes)
_FLOATS = (float, complex, np.inexact)
_ELEMENTS = (*_TEXTS, *_FLOATS, int, np.integer, np.bool_)
_USUAL = {*_TEXTS, bool, int, float, complex}


def to_array(spec: ArraySpec, value: Any) -> Array:
    """Convert an argument to an array in C order and native byte order. Raises InvalidArgument."""
    if type(value) is not np.ndarray or value.dtype.kind in "OV":
        try:
            value = _array(spec, value)
        except InvalidArgument:
            raise
        except Exception as error:  # noqa: BLE001 (any library's array may refuse to become NumPy's, in its own way)
            ragged = "wanted lists of equal length: " if "inhomogeneous shape" in str(error) else ""
            raise refusal(spec, f"{ragged}{error}") from None
    if spec.dtypes and dtype_name(value) not in spec.dtypes:
        value = _widened(spec, value)
    array: Array = np.asarray(value, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def refusal(spec: ArraySpec, why: str) -> InvalidArgument:
    """The error for an argument that cannot be taken."""
    return InvalidArgument(f"{spec.name}: {why}", field=spec.name)


def _array(spec: ArraySpec, value: Any) -> Array:
    """Make an array of anything; of a dtype that the kernel takes, if the value has none."""
    if hasattr(value, "dtype") or hasattr(value, "__array__"):
        array = _plain(value)
        return _of_objects(spec, array, value) if array.dtype.kind == "O" else array
    _check(value)
    array = np.asarray(value)
    if array.dtype.kind in "mM":
        return array
    # NumPy rounds large whole numbers beside a fraction, and cuts zeros off the ends of strings.
    if array.dtype.kind in "biufc" and not _has_large(array):
        wanted = spec.dtypes[0] if spec.dtypes else array.dtype
        if wanted != OBJECT and np.can_cast(array.dtype, wanted, "safe"):
            return array.astype(wanted)
    return _of_objects(spec, np.asarray(value, dtype=object), value)


def _check(value: Any) -> None:
    """Refuse parts of a list, however deep in it, that mean more than their numbers. Raises ValueError."""
    if isinstance(value, list | tuple):
        for kind in set(map(type, value)) - _USUAL:
            for part in value:
                if type(part) is kind:
                    _check(part)
    elif not isinstance(value, _ELEMENTS):
        _plain(value)


def _plain(value: Any) -> Array:
    """Make a plain array of any library's array. Raises ValueError if that means more than its elements."""
    is_array = isinstance(value, np.ndarray)
    if is_array and np.any(getattr(value, "mask", False)):
        raise ValueError("masked elements cannot be sent; send its filled(value), or its compressed()")
    # pint and others have `units`; astropy has `unit`, and pandas has another meaning of it.
    has = value if is_array else type(value)
    if hasattr(has, "units") or (hasattr(has, "unit") and hasattr(has, "to_value")):
        raise ValueError("a unit cannot be sent; send plain numbers, in the unit that the kernel expects")
    if hasattr(has, "isna"):
        _check_missing(value)
    array = np.asarray(value)
    if array.dtype.names:
        raise ValueError(f"named fields cannot be sent; send each as an array: {', '.join(array.dtype.names)}")
    return array


def _check_missing(value: Any) -> None:
    """Refuse missing values of pandas' own dtypes. Those of NumPy's dtypes are NaN. Raises ValueError."""
    for column in [value] if hasattr(value, "dtype") else [column for _, column in value.items()]:
        if not isinstance(column.dtype, np.dtype) and np.any(column.isna()):
            raise ValueError("missing values cannot be sent; send its fillna(value), or its dropna()")


def _of_objects(spec: ArraySpec, array: Array, value: Any) -> Array:
    """Give Python's numbers the first dtype that holds them, and keep strings. Raises InvalidArgument.

    Texts are numbers only for a kernel that takes no strings, or beside numbers.
    """
    objects = array.reshape(-1).tolist()
    _check_elements(spec, array, value, objects)
    dtypes = spec.dtypes or _natural(objects)
    are_texts = all(isinstance(element, _TEXTS) for element in objects)
    if OBJECT in dtypes and objects and are_texts:
        return array
    for dtype in dtypes:
        if dtype != OBJECT:
            if (cast := _cast(objects, np.dtype(dtype))) is not None:
                return cast.reshape(array.shape)
        elif are_texts:
            return array
    some = ", ".join(map(shown, objects[:4])) + (", …" if len(objects) > 4 else "")
    raise refusal(spec, f"wanted {' or '.join(spec.kinds or dtypes)}, which cannot hold {some}")


def _check_elements(spec: ArraySpec, array: Array, value: Any, objects: list[Any]) -> None:
    """Refuse what is neither a number nor a string. Raises InvalidArgument."""
    for index, element in enumerate(objects):
        if not isinstance(element, _ELEMENTS):
            what = f"element {index} is {shown(element)}" if array.ndim else f"got a {type(value).__name__}"
            advice = "; send its toarray()" if hasattr(value, "toarray") else ""
            raise refusal(spec, f"wanted an array of numbers or strings, but {what}{advice}")


def _natural(numbers: list[Any]) -> tuple[str, ...]:
    """The dtypes of numbers, or of strings, for a kernel that takes any."""
    if all(isinstance(number, bool) for number in numbers):
        return ("bool", OBJECT)
    whole, floats = ("int64", "uint64"), ("float64", "complex128")
    return (
        (*floats, *whole, OBJECT)
        if any(isinstance(number, _FLOATS) for number in numbers)
        else (*whole, *floats, OBJECT)
    )


def _cast(objects: list[Any], dtype: np.dtype[Any]) -> Array | None:
    """Make an array of numbers, and of texts that are numbers if they are to be floats; None if one is not kept."""
    numbers = np.empty(len(objects), dtype=object)
    try:
        is_float = dtype.kind in "fc"
        numbers[:] = [number(one) if is_float and isinstance(one, str) else one for one in objects]
        with np.errstate(all="ignore"):
            cast = numbers.astype(dtype)
    except (TypeError, ValueError, OverflowError):
        return None
    kept = _is_near if is_float else _is_same
    return cast if all(map(kept, numbers, cast.tolist())) else None


def _is_near(number: Any, cast: Any) -> bool:
    return bool(number == cast) or (isinstance(number, _FLOATS) and (isfinite(cast) or not isfinite(number)))


def _is_same(number: Any, cast: Any) -> bool:
    # A float that is so large may stand for other whole numbers, too.
    return bool(number == cast) and not (isinstance(number, _FLOATS) and abs(cast) >= _MAX_EXACT)


def _widened(spec: ArraySpec, array: Array) -> Array:
    """Convert an array to a dtype that holds all values of its own. Without one it stays, and the server refuses it."""
    for dtype in spec.dtypes:
        if dtype != OBJECT and np.can_cast(array.dtype, dtype, "safe"):
            cast = array.astype(dtype)
            if not _has_large(array) or (cast.astype(object) == array.astype(object)).all():
                return cast
    return array


def _has_large(array: Array) -> bool:
    size: Any = np.abs(array) if array.dtype.kind == "c" else array
    return bool(((size >= _MAX_EXACT) | (size <= -_MAX_EXACT)).any())
