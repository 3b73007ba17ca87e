"""A kernel's signature for people, and an example command that calls it."""

import json
import shlex
from math import prod
from typing import Any

from unlatch.common.kernel.datatypes import OBJECT
from unlatch.common.kernel.lists import Value, to_json
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, ScalarSpec

_SCALARS = {"bool": "true", "int": "1", "float": "1.0", "str": "text"}


def signature(spec: KernelSpec) -> str:
    """A signature on one line: (image: float64|float32[h w], *, sigma: float = 1.0) -> output0: …"""
    arguments = [_array(array) for array in spec.inputs]
    if spec.scalars:
        arguments += ["*", *map(_scalar, spec.scalars)]
    return f"({', '.join(arguments)}) -> {', '.join(map(_array, spec.outputs))}"


def lines(spec: KernelSpec) -> str:
    """A signature with one argument a line and all dtypes."""
    told = [f"{spec.name}("]
    told += [f"    {_array(array, in_full=True)}," for array in spec.inputs]
    told += [f"    {_scalar(scalar)}," for scalar in spec.scalars]
    told.append(") ->")
    told += [f"    {_array(array, in_full=True)}" for array in spec.outputs]
    return "\n".join(told)


def example(spec: KernelSpec, server: str = "") -> str:
    """A command to copy. Its arrays have a valid dtype and shape; valid values are up to the kernel."""
    longest = max((len(array.dims) for array in spec.inputs), default=0)
    # A square matrix that counts from 1 can be inverted if it has two rows.
    length = 2 if longest > 1 else 3
    words = ["unlatch", "call", spec.name]
    words += [f"{array.name}={json.dumps(_values(array, length))}" for array in spec.inputs if not array.optional]
    words += [f"{scalar.name}={_scalar_value(scalar)}" for scalar in spec.scalars if scalar.required]
    words += ["--server", server] if server else []
    return shlex.join(words)


def _array(array: ArraySpec, *, in_full: bool = False) -> str:
    dtypes = array.kinds
    text = "any" if not dtypes else "|".join(dtypes) if in_full or len(dtypes) <= 2 else f"{dtypes[0]}|…"
    none = " | None = None" if array.optional else ""
    return f"{array.name}: {text}[{' '.join(array.dims)}]{none}"


def _scalar(scalar: ScalarSpec) -> str:
    value = list(scalar.default) if isinstance(scalar.default, tuple) else scalar.default
    default = "" if scalar.required else f" = {value!r}"
    return f"{scalar.name}: {scalar.kind}{default}"


def _scalar_value(scalar: ScalarSpec) -> str:
    """A value as the command line takes it: the first choice, or any value of the type."""
    if scalar.many:
        return to_json(scalar.choices[:1] or [scalar.read_one(_SCALARS[scalar.type])])
    return written(scalar.choices[0]) if scalar.choices else _SCALARS[scalar.type]


def written(value: Value) -> str:
    """A scalar as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(array: ArraySpec, length: int) -> Any:
    shape = [_length(dim, length) for dim in array.dims if not dim.startswith("*")]
    dtype = array.dtypes[0] if array.dtypes else ""
    flat: list[Any] = [_value(dtype, number) for number in range(1, prod(shape) + 1)]
    for size in reversed(shape[1:]):
        flat = [flat[at : at + size] for at in range(0, len(flat), size)]
    return flat if shape else flat[0]


def _length(dim: str, length: int) -> int:
    return length if dim in (ELLIPSIS, ANY_LENGTH) or not dim.isdecimal() else int(dim)


def _value(dtype: str, number: int) -> bool | int | str:
    if dtype == "bool":
        return number % 2 == 1
    # Modulo, since counting through a large fixed shape would overflow a small integer type.
    return str(number) if dtype == OBJECT else (number - 1) % 100 + 1
