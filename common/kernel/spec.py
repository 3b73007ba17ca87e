"""A kernel as plain data: what its decorator reads from the signature and everybody else goes by.

No NumPy and no protobuf here: the worker that imports the kernels sends these to the front as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unlatch.common.errors import InvalidArgument

ELLIPSIS = "..."
ANY_LENGTH = "_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array argument or output."""

    name: str
    # NumPy's names, the preferred one first; empty for any.
    dtypes: tuple[str, ...]
    # An entry an axis: "3", a name that means one length throughout a call, "_", or one "..." or "*name".
    dims: tuple[str, ...]


def one_by_one(dims: Sequence[str], shape: Sequence[int]) -> tuple[Sequence[str], Sequence[int], str, Sequence[int]]:
    """Axes that stand for one each, and their lengths; then the entry that stands for many, if any, and theirs.

    The first two differ in number where the shape does not have the axes that are declared.
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
    """One keyword argument of a scalar type."""

    name: str
    type: str
    required: bool
    default: bool | int | float | str | None

    def read(self, text: str) -> bool | int | float | str:
        """A value from the command line. Raises InvalidArgument."""
        try:
            if self.type == "bool":
                return {"true": True, "false": False}[text.lower()]
            kinds: dict[str, Callable[[str], int | float | str]] = {"int": int, "float": float, "str": str}
            return kinds[self.type](text)
        except (KeyError, ValueError):
            raise InvalidArgument(f"{self.name}: wanted a {self.type}, got {text!r}", field=self.name) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel."""

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
