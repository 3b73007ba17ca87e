"""Inputs that a kernel's signature allows: every declared dtype, axes of several lengths, values from a seed."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from unlatch.common.kernel.datatypes import OBJECT
from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, ScalarSpec
from unlatch.common.kernel.tensors import Array
from unlatch.compute.ipc.frames import Parameters

# Tried for arrays that allow any dtype: one for each layout of elements.
_ANY_DTYPE = ("float64", "float32", "float16", "complex128", "int64", "uint8", "bool", "datetime64[s]", OBJECT)
_SMALL = 3
# The longest length whose arrays stay within this many bytes is used, since an array may have many axes.
_TYPICAL, _TYPICAL_BYTES = (24, 12, 6, 4), 1024 * 1024
# A `...` or `*name` stands for zero to this many axes.
_MAX_MANY = 3
# An element of an array of texts, as one of an array of objects.
_TEXT_BYTES = 8
# Letters of one to four bytes in UTF-8.
_LETTERS = list("abxyz 019-ß€漢😀")
# Values of required scalars, unless the user sets them.
_SCALARS: Mapping[str, Value] = {"bool": True, "int": 2, "float": 0.5, "str": "a"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The arguments of one call. `says` describes them; `finite` is false if NaN and infinities are among them.

    An array that is left out is None.
    """

    says: str
    arrays: tuple[Array | None, ...]
    scalars: Parameters
    finite: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(array.nbytes for array in self.arrays if array is not None)

    def row(self, number: int) -> "Case":
        """A single row of a batch, as a batch of one."""
        arrays = tuple(None if array is None else array[number : number + 1] for array in self.arrays)
        return Case(says=f"row {number} of {self.says}", arrays=arrays, scalars=self.scalars)


class Cases:
    """A source of a kernel's cases; the same seed gives the same ones. With `positive` no number is negative."""

    def __init__(self, spec: KernelSpec, seed: int, given: Parameters) -> None:
        self.positive = False
        self._spec = spec
        self._seed = [seed, zlib.crc32(spec.name.encode())]
        self._scalars: Parameters = {
            scalar.name: given.get(scalar.name, _scalar(scalar))
            for scalar in spec.scalars
            if scalar.required or scalar.name in given
        }
        self._free = [scalar for scalar in spec.scalars if scalar.name not in given]

    def dry(self) -> Iterator[Case]:
        """Yield each edge case once.

        Every dtype, then every choice and the empty list, each optional array left out, lengths 0 and 1, and last NaN
        and infinity.
        """
        families = [_dtypes(array) for array in self._spec.inputs]
        yield from self._every_dtype(families)
        yield from self._every_choice()
        if not families:
            return
        yield from self._every_absence()
        for length in (1,) if self._spec.nonempty else (0, 1):
            yield self._case(length)
        if any(_is_many(dim) for array in self._spec.inputs for dim in array.dims):
            for many in range(_MAX_MANY + 1):
                yield self._case(_SMALL, many=many)
        if any(family[0].startswith(("float", "complex")) for family in families):
            yield self._case(_SMALL, finite=False)

    def _every_choice(self) -> Iterator[Case]:
        """Cases with every choice of each scalar, and with empty lists."""
        for scalar in self._free:
            for value in _edges(scalar):
                yield self._case(_SMALL, scalars={scalar.name: value})

    def _every_absence(self) -> Iterator[Case]:
        """Cases without each optional array, and without all of them."""
        optional = [array.name for array in self._spec.inputs if array.optional]
        for names in [[name] for name in optional] + ([optional] if len(optional) > 1 else []):
            case = self._case(_SMALL)
            arrays = tuple(
                None if array.name in names else value
                for array, value in zip(self._spec.inputs, case.arrays, strict=True)
            )
            yield replace(case, arrays=arrays, says=f"{case.says} without {' and '.join(names)}")

    def typical(self, draw: int) -> Case:
        """A case of medium size. Each draw has other values in the same shapes."""
        fitting = (length for length in _TYPICAL if self.nbytes(length) <= _TYPICAL_BYTES)
        return self._case(next(fitting, _SMALL), draw=draw)

    def batch(self, rows: int) -> Case:
        """A case whose first axes are all `rows` long."""
        return self._case(_SMALL, rows=rows, many=1)

    def of_length(self, length: int) -> Case:
        """A case whose named axes are about this long."""
        return self._case(length)

    def nbytes(self, length: int) -> int:
        """Bytes of all arrays of `of_length`, computed without making them."""
        lengths = self._lengths(length)
        return sum(
            prod(_shape(array, lengths, self._many())) * (np.dtype(_dtypes(array)[0]).itemsize or _TEXT_BYTES)
            for array in self._spec.inputs
        )

    @property
    def grows(self) -> bool:
        """Whether the size of any input can vary."""
        return self.nbytes(8) > self.nbytes(4)

    def _many(self) -> int:
        """The number of axes that `...` stands for by default: one if the arrays have no named axis, else none."""
        named = any(not _is_many(dim) and not dim.isdecimal() for array in self._spec.inputs for dim in array.dims)
        return 0 if named else 1

    def _every_dtype(self, families: Sequence[tuple[str, ...]]) -> Iterator[Case]:
        """Cases with every dtype of each array: first all arrays with the same dtype, then each with another."""
        for apart in (0, 1) if sum(len(family) > 1 for family in families) > 1 else (0,):
            for turn in range(max(map(len, families), default=1)):
                dtypes = [family[(turn + apart * place) % len(family)] for place, family in enumerate(families)]
                yield self._case(_SMALL, dtypes=dtypes)

    def _lengths(self, length: int) -> dict[str, int]:
        """A length for each axis name, all different, so that mixed-up axes are noticed."""
        names = dict.fromkeys(dim for array in self._spec.inputs for dim in array.dims if not dim.isdecimal())
        return {name: length + place if length > 1 else length for place, name in enumerate(names)}

    def _case(
        self,
        length: int,
        *,
        dtypes: list[str] | None = None,
        many: int | None = None,
        rows: int | None = None,
        draw: int = 0,
        finite: bool = True,
        scalars: Parameters | None = None,
    ) -> Case:
        dtypes = dtypes or [_dtypes(array)[0] for array in self._spec.inputs]
        lengths = self._lengths(length)
        many = self._many() if many is None else many
        if rows is not None:
            lengths |= {array.dims[0]: rows for array in self._spec.inputs}
        shapes = [_shape(array, lengths, many) for array in self._spec.inputs]
        if rows is not None:
            shapes = [(rows, *shape[1:]) for shape in shapes]
        random = np.random.default_rng([*self._seed, draw])
        arrays = tuple(
            _values(random, dtype, shape, finite=finite, positive=self.positive)
            for dtype, shape in zip(dtypes, shapes, strict=True)
        )
        parameters = {**self._scalars, **(scalars or {})}
        says = self._says(dtypes, shapes, parameters, finite=finite)
        return Case(says=says, arrays=arrays, scalars=parameters, finite=finite)

    def _says(
        self, dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], scalars: Parameters, *, finite: bool
    ) -> str:
        """A description of a case's arguments."""
        says = ", ".join(
            f"{array.name}: {dtype}[{', '.join(map(str, shape))}]"
            for array, dtype, shape in zip(self._spec.inputs, dtypes, shapes, strict=True)
        )
        if not finite:
            says += " with NaN and infinity"
        if self.positive:
            says += " of positive numbers"
        says += "".join(f", {name}={value!r}" for name, value in scalars.items())
        return says or "no arguments"


def _scalar(scalar: ScalarSpec) -> Value | list[Value]:
    """A valid value: the first choice, if there are choices; of a list, two elements."""
    one = scalar.choices[0] if scalar.choices else _SCALARS[scalar.type]
    return [one, one] if scalar.many else one


def _edges(scalar: ScalarSpec) -> Iterator[Value | list[Value]]:
    """Values of a scalar that a kernel may treat in another way than the rest."""
    if scalar.many:
        yield []
        yield list(scalar.choices) or [_SCALARS[scalar.type]]
    else:
        yield from scalar.choices


def _dtypes(array: ArraySpec) -> tuple[str, ...]:
    return array.kinds or _ANY_DTYPE


def _is_many(dim: str) -> bool:
    return dim == ELLIPSIS or dim.startswith("*")


def _shape(array: ArraySpec, lengths: Mapping[str, int], many: int) -> tuple[int, ...]:
    shape: list[int] = []
    for dim in array.dims:
        if _is_many(dim):
            shape += [lengths[dim]] * many
        else:
            # Anonymous axes are independent of one another, so their lengths differ.
            apart = len(shape) if dim == ANY_LENGTH and lengths[dim] > 1 else 0
            shape.append(int(dim) if dim.isdecimal() else lengths[dim] + apart)
    return tuple(shape)


def _values(random: np.random.Generator, dtype: str, shape: tuple[int, ...], *, finite: bool, positive: bool) -> Array:
    kind = np.dtype(dtype).kind
    if kind == "f":
        values = np.asarray(random.standard_normal(shape))
        return _spoilt((abs(values) if positive else values).astype(dtype), finite=finite)
    if kind == "c":
        values = np.asarray(random.standard_normal(shape) + 1j * random.standard_normal(shape))
        return _spoilt(values.astype(dtype), finite=finite)
    if kind == "b":
        return np.asarray(random.random(shape) < 0.5)
    if kind in "OU":
        texts = np.empty(prod(shape), dtype=object)
        drawn = ["".join(random.choice(_LETTERS, size)) for size in random.integers(0, 9, prod(shape))]
        texts[:] = drawn if kind == "U" else [text.encode() for text in drawn]
        return texts.reshape(shape)
    low, high = (0, 200) if kind == "u" else (1 if positive else -100, 100)
    return np.asarray(random.integers(low, high, shape)).astype(dtype)


def _spoilt(values: Array, *, finite: bool) -> Array:
    if not finite:
        flat = values.reshape(-1)
        for place, value in zip(range(0, flat.size, 2), (np.nan, np.inf, -np.inf), strict=False):
            flat[place] = value
    return values
