"""Arrays as text for people, and as JSON."""

from typing import Any

import numpy as np

from unlatch.cli import plain
from unlatch.common.kernel.tensors import Array

_MAX_SHOWN = 200


def text(name: str, array: Array) -> str:
    """Name, dtype, shape and values; for a large array its range and its corners."""
    lines = [f"{name}: {array.dtype} {array.shape}"]
    if array.size > _MAX_SHOWN and array.dtype.kind in "iuf":
        lines.append(_range(array))
    shown = np.array(_each(array, _readable), dtype=object) if array.dtype.kind == "O" else array
    lines.append(np.array2string(shown, precision=6, threshold=_MAX_SHOWN, max_line_width=100))
    return plain("\n".join(lines))


def as_json(name: str, array: Array, *, text: bool) -> dict[str, Any]:
    """{"name", "dtype", "shape", "data"}: docs/cli.md describes the form of data."""
    return {**description(name, array, text=text), "data": _data(array)}


def description(name: str, array: Array, *, text: bool) -> dict[str, Any]:
    """{"name", "dtype", "shape"} of an array. One of strings has texts or bytes."""
    strings = "str" if text else "bytes"
    dtype = strings if array.dtype.kind == "O" else array.dtype.name
    return {"name": name, "dtype": dtype, "shape": list(array.shape)}


def number(value: float) -> float | str:
    """A float for JSON. JSON has no NaN and no infinity, so these become strings as in protobuf's JSON."""
    if np.isfinite(value):
        return value
    return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _range(array: Array) -> str:
    finite = array[np.isfinite(array)]
    if not finite.size:
        return "no finite value"
    strange = array.size - finite.size
    note = f", {strange} not finite" if strange else ""
    return f"min {finite.min():.6g}, mean {finite.mean(dtype=np.float64):.6g}, max {finite.max():.6g}{note}"


def _data(array: Array) -> Any:
    kind = array.dtype.kind
    if kind == "O":
        return _each(array, _readable)
    if kind in "mM":
        return array.astype(np.str_).tolist()
    if kind == "c":
        array = np.stack([array.real, array.imag], axis=-1)
    if kind in "fc" and not np.isfinite(array).all():
        return _each(array, number)
    return array.tolist()


def _each(array: Array, convert: Any) -> Any:
    converted = np.empty(array.size, dtype=object)
    converted[:] = [convert(value) for value in array.reshape(-1).tolist()]
    return converted.reshape(array.shape).tolist()


def _readable(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
