"""Datatypes of the Open Inference Protocol, and the NumPy dtypes that they carry.

No NumPy is imported here: the dispatcher knows dtypes by name.

Complex and datetime arrays have no datatype of their own. They travel as FP32 or FP64 with a last axis of 2, or as
INT64, and the tensor parameter `np_dtype` names their dtype.
"""

import re
from collections.abc import Sequence
from math import prod

from unlatch.common.errors import InvalidArgument

NP_DTYPE = "np_dtype"
BYTES = "BYTES"
OBJECT = "object"

# datatype -> (NumPy's name, bytes of an element)
DATATYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "UINT8": ("uint8", 1),
    "UINT16": ("uint16", 2),
    "UINT32": ("uint32", 4),
    "UINT64": ("uint64", 8),
    "INT8": ("int8", 1),
    "INT16": ("int16", 2),
    "INT32": ("int32", 4),
    "INT64": ("int64", 8),
    "FP16": ("float16", 2),
    "FP32": ("float32", 4),
    "FP64": ("float64", 8),
    BYTES: (OBJECT, 0),
}
_BY_DTYPE = {dtype: datatype for datatype, (dtype, _) in DATATYPES.items()}
_COMPLEX = {"complex64": "FP32", "complex128": "FP64"}
_TIMES = ("datetime64", "timedelta64")
_TIME = re.compile(r"(datetime64|timedelta64)\[(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\]")
_ITEM_BYTES = dict(DATATYPES.values()) | {"complex64": 8, "complex128": 16}
# NumPy's limits of bytes and axes.
_MAX_BYTES = 2**63 - 1
_MAX_AXES = 64


def carrier(dtype: str) -> str:
    """The datatype that carries a NumPy dtype, given by name. Raises KeyError if none does."""
    if dtype.startswith(_TIMES):
        return "INT64"
    return _COMPLEX.get(dtype) or _BY_DTYPE[dtype]


def is_served(dtype: str) -> bool:
    """Whether a datatype carries this NumPy dtype, given by name."""
    return dtype in _BY_DTYPE or dtype in _COMPLEX or _is_time(dtype)


def is_carried(dtype: str) -> bool:
    """Whether a dtype differs from its datatype's own, so that the tensor needs `np_dtype`."""
    return dtype.startswith(_TIMES) or dtype in _COMPLEX


def is_held(dtype: str, shape: Sequence[int], length: int) -> bool:
    """Whether an array of this served dtype and shape has `length` bytes. Always true for elements of varying size."""
    size = _ITEM_BYTES.get(dtype, 8)
    return len(shape) <= _MAX_AXES and (not size or prod(shape) * size == length)


def seen_by_numpy(
    field: str, datatype: str, shape: Sequence[int], np_dtype: str, length: int
) -> tuple[str, tuple[int, ...]]:
    """A tensor's dtype and shape as its kernel sees them, checked against its number of bytes.

    Raises InvalidArgument naming `field` for an unknown datatype, an impossible shape, an `np_dtype` that the datatype
    cannot carry, or a number of bytes that does not match the shape.
    """
    known = DATATYPES.get(datatype)
    if known is None:
        raise InvalidArgument(
            f"{field}: datatype {datatype[:32]!r} is not served; wanted one of {', '.join(DATATYPES)}", field=field
        )
    dtype, itemsize = known
    if len(shape) > _MAX_AXES:
        raise InvalidArgument(f"{field}: {len(shape)} axes, but an array has at most {_MAX_AXES}", field=field)
    for size in shape:
        if size < 0:
            raise InvalidArgument(f"{field}: shape {list(shape)} has a negative length", field=field)
    count = prod(shape)
    # The product without zeros must be addressable too: NumPy refuses (0, 2**62) as well as (2**62,).
    if count > _MAX_BYTES or (not count and prod(filter(None, shape)) > _MAX_BYTES // 16):
        raise InvalidArgument(f"{field}: shape {list(shape)} is more than memory can hold", field=field)
    if itemsize and count * itemsize != length:
        raise InvalidArgument(
            f"{field}: shape {list(shape)} of {datatype} is {count * itemsize} bytes, but got {length}", field=field
        )
    if np_dtype:
        return _carried(field, datatype, tuple(shape), np_dtype)
    return dtype, tuple(shape)


def _carried(field: str, datatype: str, shape: tuple[int, ...], np_dtype: str) -> tuple[str, tuple[int, ...]]:
    if _COMPLEX.get(np_dtype) == datatype:
        if not shape or shape[-1] != 2:
            raise InvalidArgument(
                f"{field}: {np_dtype} is sent as {datatype} with a last axis of 2, but the shape is {list(shape)}",
                field=field,
            )
        return np_dtype, shape[:-1]
    if datatype == "INT64" and _is_time(np_dtype):
        return np_dtype, shape
    raise InvalidArgument(f"{field}: {datatype} cannot carry {NP_DTYPE} {np_dtype[:32]!r}", field=field)


def _is_time(np_dtype: str) -> bool:
    return _TIME.fullmatch(np_dtype) is not None
