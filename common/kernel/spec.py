"""A kernel as plain data: the decorator reads it from the signature, and all other code uses it.

No NumPy and no protobuf are imported here: the worker that imports the kernels sends these to the dispatcher as they
are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unlatch.common.errors import InvalidArgument, shown
from unlatch.common.kernel.numbers import real

ELLIPSIS = "..."
ANY_LENGTH = "_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """The declaration of one array argument or output."""

    name: str
    # NumPy's names, the preferred one first; empty for any dtype.
    dtypes: tuple[str, ...]
    # One entry an axis: "3", a name that stands for one length throughout a call, "_", or one "..." or "*name".
    dims: tuple[str, ...]


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
    """The declaration of one keyword argument of a scalar type."""

    name: str
    type: str
    required: bool
    default: bool | int | float | str | None

    def read(self, text: str) -> bool | int | float | str:
        """Parse a value from the command line. Raises InvalidArgument."""
        try:
            if self.type == "bool":
                return {"true": True, "false": False}[text.lower()]
            kinds: dict[str, Callable[[str], int | float | str]] = {"int": int, "float": real, "str": str}
            return kinds[self.type](text)
        except OverflowError as error:
            raise InvalidArgument(f"{self.name}: {error}", field=self.name) from None
        except (KeyError, ValueError):
            raise InvalidArgument(
                f"{self.name}: wanted a value of type {self.type}, got {shown(text)}", field=self.name
            ) from None


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
