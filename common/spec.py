"""A kernel as plain data: what its decorator reads from the signature and everybody else goes by.

No NumPy and no protobuf here: the worker that imports the kernels sends these to the front as they are.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarSpec:
    """One keyword argument of a scalar type."""

    name: str
    type: str
    required: bool
    default: bool | int | float | str | None


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
