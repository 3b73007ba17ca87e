"""`@kernel`: the decorator that declares a NumPy function to be a kernel, with its signature as the contract.

    @kernel(pure=True)
    def normalise(x: Float64[np.ndarray, "rows cols"], *, eps: float = 1e-9) -> Float64[np.ndarray, "rows cols"]:
        ...

Array arguments come first and have jaxtyping annotations; keyword-only arguments are scalars. The function itself is
not changed: it can be called, tested and imported without a running Unlatch.
"""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints, overload

from unlatch.common.errors import KernelError
from unlatch.common.kernel.datatypes import DATATYPES
from unlatch.common.kernel.spec import ANY_LENGTH, ArraySpec, KernelSpec, ScalarSpec

__all__ = ["DeclarationError", "KernelError", "kernel", "spec_of"]

F = TypeVar("F", bound=Callable[..., Any])

_SPEC = "__unlatch_kernel__"
# The attribute of a module that lists its declared kernels, in order.
DECLARED = "__unlatch_declared__"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_INPUT_DIM = re.compile(r"(\d+|\*?[A-Za-z_][A-Za-z0-9_]*|\.\.\.)\Z")
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}
# Names that a client's call and the protocol use themselves.
_RESERVED = frozenset({"priority", "timeout"})
# The order in which dtypes are reported for a kernel that takes several: readers of metadata use the first.
_PREFERENCE = ("float64", "float32", "complex128", "complex64", "int64", "uint8", "bool")
_SERVED = [*_PREFERENCE, *(name for name, _ in DATATYPES.values() if name not in _PREFERENCE)]


class DeclarationError(TypeError):
    """A function that cannot be a kernel. The message names its file and line, and what was expected."""


@overload
def kernel(function: F, /) -> F: ...
@overload
def kernel(
    *,
    name: str | None = None,
    version: str = "1",
    pure: bool = False,
    batch: bool = False,
    max_batch_size: int = 64,
    timeout: float | None = None,
    memory: int | None = None,
) -> Callable[[F], F]: ...
def kernel(
    function: F | None = None,
    /,
    *,
    name: str | None = None,
    version: str = "1",
    pure: bool = False,
    batch: bool = False,
    max_batch_size: int = 64,
    timeout: float | None = None,
    memory: int | None = None,
) -> F | Callable[[F], F]:
    """Declare a NumPy function to be a kernel.

    - `name`: the name that callers use; by default the function's name.
    - `version`: an opaque string that callers may ask for.
    - `pure`: the result depends on the arguments only, so a call may be run again if its worker dies.
    - `batch`, `max_batch_size`: the first axis of every array and result is a batch, and each row's result depends on
      that row only; waiting calls are run as one, with up to `max_batch_size` rows.
    - `timeout`: maximum seconds of one run.
    - `memory`: maximum bytes that one run needs.

    Raises DeclarationError if the signature cannot be a kernel's.
    """

    def declare(function: F) -> F:
        spec = KernelSpec(
            name=name or function.__name__,
            version=version,
            doc=inspect.getdoc(function) or "",
            **_signature(function),
            pure=pure,
            batch=batch,
            max_batch_size=max_batch_size,
            timeout_seconds=timeout,
            memory_bytes=memory,
        )
        if not _NAME.match(spec.name):
            raise _refusal(function, f"name={spec.name!r} is not an identifier")
        if timeout is not None and not 0 < timeout < math.inf:
            raise _refusal(function, f"timeout={timeout!r} is not a number of seconds above 0")
        if memory is not None and not (isinstance(memory, int) and memory > 0):
            raise _refusal(function, f"memory={memory!r} is not a whole number of bytes above 0")
        if not (isinstance(max_batch_size, int) and max_batch_size >= 1):
            raise _refusal(function, f"max_batch_size={max_batch_size!r} is not a whole number above 0")
        if batch:
            _check_batch(function, spec)
        setattr(function, _SPEC, spec)
        # A second function with the same name replaces the first in its module, but not in this list.
        function.__globals__.setdefault(DECLARED, []).append(function)
        return function

    return declare if function is None else declare(function)


def spec_of(candidate: object) -> KernelSpec | None:
    """The spec of a kernel; None for any other object."""
    spec = getattr(candidate, _SPEC, None)
    return spec if isinstance(spec, KernelSpec) else None


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function)
    inputs: list[ArraySpec] = []
    scalars: list[ScalarSpec] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name)
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            inputs.append(_array(function, parameter.name, hint))
            if parameter.default is not parameter.empty:
                raise _refusal(function, f"array {parameter.name!r} has a default; arrays are always required")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            scalars.append(_scalar(function, parameter, hint))
        else:
            raise _refusal(function, f"{parameter} is neither a named array nor a keyword-only scalar")
    for array in inputs:
        for dim in array.dims:
            if not _INPUT_DIM.match(dim):
                raise _refusal(
                    function, f"axis {dim!r} of {array.name!r} is neither a length, a name, '_', '...' nor '*name'"
                )
    return {"inputs": tuple(inputs), "scalars": tuple(scalars), "outputs": _outputs(function, hints.get("return"))}


def _check_batch(function: Callable[..., Any], spec: KernelSpec) -> None:
    """Check that every array's first axis is the batch, under one name, so that calls can run as one."""
    if spec.max_batch_size < 1:
        raise _refusal(function, f"max_batch_size={spec.max_batch_size} is not a number of rows, at least 1")
    arrays = (*spec.inputs, *spec.outputs)
    first = arrays[0].dims[0] if arrays[0].dims else ""
    if not spec.inputs or first == ANY_LENGTH or not _NAME.match(first):
        raise _refusal(function, "batch=True needs arrays whose first axis has a name: 'rows' or 'rows n'")
    for array in arrays:
        if array.dims[:1] != (first,) or first in array.dims[1:]:
            raise _refusal(
                function,
                f"with batch=True the first axis of every array and result, and no other, must be {first!r}; "
                f"{array.name!r} has {' '.join(array.dims) or 'no axis'!r}",
            )


def _array(function: Callable[..., Any], name: str, hint: Any) -> ArraySpec:
    dims = getattr(hint, "dim_str", None)
    if dims is None:
        raise _refusal(function, f"{name!r} needs a jaxtyping annotation such as Float64[np.ndarray, 'rows cols']")
    axes = tuple(dims.split())
    if sum(axis == "..." or axis.startswith("*") for axis in axes) > 1:
        raise _refusal(function, f"{name!r} has more than one '...' or '*name'")
    return ArraySpec(name=name, dtypes=_dtypes(function, name, hint.dtypes), dims=axes)


def _dtypes(function: Callable[..., Any], name: str, wanted: Any) -> tuple[str, ...]:
    # For jaxtyping's Shaped this is a sentinel that stands for any dtype; for its other types, a list of NumPy's names.
    if not isinstance(wanted, tuple | list):
        return ()
    served = tuple(dtype for dtype in _SERVED if dtype in wanted or (dtype == "bool" and "bool_" in wanted))
    if not served:
        raise _refusal(function, f"{name!r} takes none of the served dtypes: {', '.join(_SERVED)}")
    return served


def _scalar(function: Callable[..., Any], parameter: inspect.Parameter, hint: Any) -> ScalarSpec:
    if hint not in _SCALARS:
        raise _refusal(function, f"{parameter.name!r} must be a bool, int, float or str")
    if parameter.name in _RESERVED:
        raise _refusal(function, f"the parameter name {parameter.name!r} is reserved for calls; choose another name")
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    fitting = (int, float) if hint is float else hint
    if not required and not isinstance(default, fitting):
        raise _refusal(function, f"the default of {parameter.name!r} is not of type {_SCALARS[hint]}")
    return ScalarSpec(name=parameter.name, type=_SCALARS[hint], required=required, default=default)


def _outputs(function: Callable[..., Any], hint: Any) -> tuple[ArraySpec, ...]:
    if hint is None:
        raise _refusal(function, "the result needs a jaxtyping annotation, or a NamedTuple of them")
    named = getattr(hint, "_fields", None)
    if named is not None:
        fields = get_type_hints(hint)
        return tuple(_array(function, field, fields.get(field)) for field in named)
    arrays = getattr(hint, "__args__", None) if getattr(hint, "__origin__", None) is tuple else (hint,)
    return tuple(_array(function, f"output{index}", array) for index, array in enumerate(arrays or ()))


def _refusal(function: Callable[..., Any], why: str) -> DeclarationError:
    code = function.__code__
    return DeclarationError(f"{code.co_filename}:{code.co_firstlineno}: kernel {function.__name__}: {why}")
