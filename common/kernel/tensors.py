"""Arrays and their bytes: what worker and client do alike. (Gateway and front never load this: it needs NumPy.)

Byte order on the wire is little-endian, as on every machine that Linux and NumPy run on today, so an array's bytes are
the tensor's. Elements of BYTES are each preceded by their length (uint32, little-endian).
"""

import struct
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.datatypes import OBJECT

Array = NDArray[Any]

_LENGTH = struct.Struct("<I")


def view(field: str, memory: Any, dtype: str, shape: tuple[int, ...], offset: int, length: int) -> Array:
    """An array over a tensor's bytes in `memory`, writable if the memory is; BYTES become an array of `bytes` objects.

    Raises InvalidArgument naming `field` when BYTES do not hold what the shape says.
    """
    if dtype == OBJECT:
        return unpack_bytes(field, memoryview(memory)[offset : offset + length], shape)
    return np.ndarray(shape, np.dtype(dtype), memory, offset)


def unpack_bytes(field: str, packed: memoryview, shape: tuple[int, ...]) -> Array:
    """BYTES elements as an object array. Raises InvalidArgument naming `field` for a prefix that is wrong."""
    elements: list[bytes] = []
    at, end = 0, len(packed)
    while at < end:
        body = at + _LENGTH.size
        if body > end:
            raise InvalidArgument(
                f"{field}: {end - at} bytes are left where element {len(elements)}'s length is due", field=field
            )
        (size,) = _LENGTH.unpack_from(packed, at)
        at = body + size
        if at > end:
            raise InvalidArgument(
                f"{field}: element {len(elements)} says {size} bytes, but {end - body} are left", field=field
            )
        elements.append(bytes(packed[body:at]))
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidArgument(f"{field}: {len(elements)} elements came for shape {list(shape)}", field=field) from None


def pack_bytes(array: Array) -> bytes:
    """An array of `bytes` or `str` (UTF-8) as BYTES. Raises TypeError for any other element."""
    parts: list[bytes] = []
    for element in array.reshape(-1).tolist():
        encoded = element.encode() if isinstance(element, str) else element
        if not isinstance(encoded, bytes):
            raise TypeError(f"an element of type {type(element).__name__} cannot travel as BYTES")
        parts += _LENGTH.pack(len(encoded)), encoded
    return b"".join(parts)


_name = cache(lambda dtype: str(dtype.name))


def dtype_name(array: Array) -> str:
    """NumPy's name of an array's dtype as Unlatch says it: strings and objects alike are "object"."""
    # NumPy computes a dtype's name anew, in Python, each time.
    # (Strings have a dtype a length: a cache of them would grow for ever.)
    return OBJECT if array.dtype.kind in "OSU" else _name(array.dtype)
