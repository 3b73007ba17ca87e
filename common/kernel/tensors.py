"""Conversion between arrays and bytes, for worker and client. (Gateway and dispatcher never load this: it needs NumPy.)

Byte order on the wire is little-endian, as on every machine that Linux and NumPy run on today, so an array's bytes are
the tensor's. Each element of BYTES is preceded by its length (uint32, little-endian).
"""

import struct
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.datatypes import OBJECT

Array = NDArray[Any]

# Kinds of dtypes that BYTES carry: objects, bytes, NumPy's StringDType, fixed-width str.
STRING_KINDS = "OSTU"

_LENGTH = struct.Struct("<I")


def view(
    field: str, memory: Any, dtype: str, shape: tuple[int, ...], offset: int, length: int, *, text: bool = False
) -> Array:
    """An array over a tensor's bytes in `memory`, writable if the memory is.

    BYTES become an array of `bytes` objects, or of `str` with `text`. Raises InvalidArgument as `unpack_bytes`.
    """
    if dtype == OBJECT:
        return unpack_bytes(field, memoryview(memory)[offset : offset + length], shape, text=text)
    return np.ndarray(shape, np.dtype(dtype), memory, offset)


def unpack_bytes(field: str, packed: memoryview, shape: tuple[int, ...], *, text: bool = False) -> Array:
    """Unpack BYTES elements to an object array of `bytes`, or of `str`.

    Raises InvalidArgument naming `field` for a wrong length prefix, a wrong number of elements, or a text that is not
    UTF-8.
    """
    elements: list[bytes | str] = []
    at, end = 0, len(packed)
    while at < end:
        body = at + _LENGTH.size
        if body > end:
            raise InvalidArgument(
                f"{field}: {end - at} bytes are left, too few for the length of element {len(elements)}", field=field
            )
        (size,) = _LENGTH.unpack_from(packed, at)
        at = body + size
        if at > end:
            raise InvalidArgument(
                f"{field}: element {len(elements)} has length {size}, but {end - body} bytes are left", field=field
            )
        elements.append(_text(field, len(elements), packed[body:at]) if text else bytes(packed[body:at]))
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidArgument(f"{field}: got {len(elements)} elements for shape {list(shape)}", field=field) from None


def _text(field: str, index: int, encoded: memoryview) -> str:
    try:
        return str(encoded, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{field}: element {index} is not UTF-8: {error.reason} at byte {error.start}", field=field
        ) from None


def pack_bytes(array: Array) -> bytes:
    """Pack an array of `bytes` or `str` (UTF-8) to BYTES. Raises TypeError for any other element."""
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        encoded = element.encode() if isinstance(element, str) else element
        if not isinstance(encoded, bytes):
            raise TypeError(f"an element of type {type(element).__name__} cannot be sent as BYTES")
        parts += _LENGTH.pack(len(encoded)), encoded
    return b"".join(parts)


_name = cache(lambda dtype: str(dtype.name))


def dtype_name(array: Array) -> str:
    """NumPy's name of an array's dtype, but "object" for strings and objects alike."""
    # Cached, since NumPy computes a dtype's name in Python each time. Strings are not cached: there is a dtype for each
    # length, so the cache would grow without limit.
    return OBJECT if array.dtype.kind in STRING_KINDS else _name(array.dtype)
