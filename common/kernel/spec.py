"""A kernel as plain data: the decorator reads it from the signature, and all other code uses it.

No NumPy and no protobuf are imported here: the worker that imports the kernels sends these to the dispatcher as they
are.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from unlatch.common.errors import InvalidArgument, shown
from unlatch.common.kernel.lists import Value, from_json
from unlatch.common.kernel.numbers import real

ELLIPSIS = "..."
ANY_LENGTH = "_"
# JSON has no numbers for these, so lists have them as strings, as in protobuf's JSON.
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_MIN_INT, _MAX_UINT = -(2**63), 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """The declaration of one array argument or output."""

    name: str
    # NumPy's names, the preferred one first; empty for any dtype.
    dtypes: tuple[str, ...]
    # One entry an axis: "3", a name that stands for one length throughout a call, "_", or one "..." or "*name".
    dims: tuple[str, ...]
    # Whether a call may leave the array out. The kernel then gets None.
    optional: bool = False
    # Whether the elements of an array of strings are `str`, rather than `bytes`.
    text: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The dtypes as people read them: `str` for an array of texts."""
        return ("str",) if self.text else self.dtypes


def one_by_one(dims: Sequence[str], shape: Sequence[int]) -> tuple[Sequence[str], Sequence[int], str, Sequence[int]]:
    """Match declared axes with a shape: entries that stand for one axis each, with lengths; then the one for many.

    The first two differ in number if the shape does not have the declared axes.
    """
    for index, dim in enumerate(dims):
        if dim == ELLIPSIS or dim[0] == "*":
            after = len(shape) - (len(dims) - index - 1)
            rest = [*dims[:index], *dims[index + 1 :]]
            if after < index:
                return rest, shape, dim, ()
            return rest, [*shape[:index], *shape[after:]], dim, shape[index:after]
    return dims, shape, "", ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarSpec:
    """The declaration of one keyword argument: a scalar, one of several choices, or a list of either."""

    name: str
    # "bool", "int", "float" or "str": the type of the scalar, or of a list's elements.
    type: str
    required: bool
    default: Value | tuple[Value, ...] | None
    # The only values that are taken; empty if every value of the type is.
    choices: tuple[Value, ...] = ()
    many: bool = False

    @property
    def kind(self) -> str:
        """The type as people read it: `float`, `'linear'|'cubic'`, `list[int]`."""
        one = "|".join(map(repr, self.choices)) or self.type
        return f"list[{one}]" if self.many else one

    def read(self, text: str) -> Value | list[Value]:
        """Parse a value from the command line: a list is JSON. Raises InvalidArgument."""
        if self.many:
            return self.elements(text)
        try:
            value = self.read_one(text)
        except OverflowError as error:
            raise self._wrong(str(error)) from None
        except (KeyError, ValueError):
            raise self._wrong(f"wanted a value of type {self.type}, got {shown(text)}") from None
        self.check_choice(value)
        return value

    def read_one(self, text: str) -> Value:
        """Parse one value of the type. Raises KeyError, ValueError or OverflowError."""
        if self.type == "bool":
            return {"true": True, "false": False}[text.lower()]
        kinds: dict[str, Callable[[str], int | float | str]] = {"int": int, "float": real, "str": str}
        return kinds[self.type](text)

    def elements(self, text: str, most: int | None = None) -> list[Value]:
        """Read a list of at most `most` elements from JSON. Raises InvalidArgument naming the argument and element."""
        if most is not None and self.type != "str":
            # Before the text is parsed, which takes longer. In texts, a comma need not be between two elements.
            self._bound(text.count(",") + 1, most)
        try:
            found = from_json(text)
        except ValueError as error:
            raise self._wrong(f"wanted a JSON list of {self.type}: {error}") from None
        if most is not None:
            self._bound(len(found), most)
        if self._are_right(found):
            return found
        return [self._element(index, value) for index, value in enumerate(found)]

    def _bound(self, count: int, most: int) -> None:
        if count > most:
            raise self._wrong(f"wanted a list of at most {most} elements, got {count}; send an array")

    def _are_right(self, found: list[Any]) -> bool:
        """Whether all elements can be taken as they are. No Python code is run for each: a list may be long."""
        if {kind.__name__ for kind in set(map(type, found))} - {self.type}:
            return False
        if self.type == "int" and found and not _MIN_INT <= min(found) <= max(found) <= _MAX_UINT:
            return False
        return not self.choices or set(found) <= set(self.choices)

    def check_choice(self, value: Value, which: str = "") -> None:
        """Refuse a value of the right type that is none of the choices. Raises InvalidArgument."""
        if self.choices and value not in self.choices:
            raise self._wrong(f"{which}wanted one of {', '.join(map(repr, self.choices))}, got {shown(value)}")

    def _element(self, index: int, value: object) -> Value:
        which = f"element {index}: "
        if self.type == "float" and isinstance(value, str) and value in _NOT_FINITE:
            value = float(value)
        if self.type == "float" and type(value) is int:
            value = self._as_float(which, value)
        if type(value).__name__ != self.type or not isinstance(value, Value):
            raise self._wrong(f"{which}wanted a value of type {self.type}, got {shown(value)}")
        if type(value) is int and not _MIN_INT <= value <= _MAX_UINT:
            raise self._wrong(f"{which}{shown(value)} does not fit in 64 bits")
        self.check_choice(value, which)
        return value

    def _as_float(self, which: str, value: int) -> float:
        with suppress(OverflowError):
            if float(value) == value:
                return float(value)
        raise self._wrong(f"{which}a float cannot hold {shown(value)}")

    def _wrong(self, why: str) -> InvalidArgument:
        return InvalidArgument(f"{self.name}: {why}", field=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """The declaration of one kernel."""

    name: str
    version: str
    doc: str
    inputs: tuple[ArraySpec, ...]
    scalars: tuple[ScalarSpec, ...]
    outputs: tuple[ArraySpec, ...]
    pure: bool
    batch: bool
    max_batch_size: int
    timeout_seconds: float | None
    memory_bytes: int | None
    # Whether every array needs at least one element.
    nonempty: bool = False
    # Of an `async def` kernel, the number of its calls that one async worker runs at once; None for other kernels.
    concurrency: int | None = None
