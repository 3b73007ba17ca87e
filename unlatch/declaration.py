"""`@kernel`: a NumPy function becomes a kernel, and its signature the contract.

    @kernel(pure=True)
    def normalise(x: Float64[np.ndarray, "rows cols"], *, eps: float = 1e-9) -> Float64[np.ndarray, "rows cols"]:
        ...

Array arguments come first and carry jaxtyping annotations; keyword-only arguments are scalars. The function itself
stays what it was: it is called, tested and imported without Unlatch running.
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
# Where a module keeps what it has declared, in order.
DECLARED = "__unlatch_declared__"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_INPUT_DIM = re.compile(r"(\d+|\*?[A-Za-z_][A-Za-z0-9_]*|\.\.\.)\Z")
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}
# What a client's call and the protocol take for themselves.
_RESERVED = frozenset({"priority", "timeout"})
# What a metadata reader is told first of a kernel that takes several dtypes.
_PREFERENCE = ("float64", "float32", "complex128", "complex64", "int64", "uint8", "bool")
_SERVED = [*_PREFERENCE, *(name for name, _ in DATATYPES.values() if name not in _PREFERENCE)]


class DeclarationError(TypeError):
    """A function that cannot be a kernel. The message names its file and line, and what was wanted."""


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

    - `name`: what callers say; the function's own name unless given.
    - `version`: an opaque string that callers may ask for.
    - `pure`: the result depends on the arguments alone, so a call whose worker died may be run again.
    - `batch`, `max_batch_size`: the first axis of every array and result is a batch, and each row's result depends on
      that row alone; calls that wait are run as one, up to so many rows.
    - `timeout`: seconds that one run may take.
    - `memory`: bytes that one run may need.

    Raises DeclarationError where the signature cannot be a kernel's.
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
            raise _refusal(function, f"the name {spec.name!r} is no identifier")
        if timeout is not None and not 0 < timeout < math.inf:
            raise _refusal(function, f"timeout={timeout!r} is no number of seconds above 0")
        if memory is not None and not (isinstance(memory, int) and memory > 0):
            raise _refusal(function, f"memory={memory!r} is no whole number of bytes above 0")
        if not (isinstance(max_batch_size, int) and max_batch_size >= 1):
            raise _refusal(function, f"max_batch_size={max_batch_size!r} is no whole number above 0")
        if batch:
            _check_batch(function, spec)
        setattr(function, _SPEC, spec)
        # A second function of one name hides the first from its module, but not from here.
        function.__globals__.setdefault(DECLARED, []).append(function)
        return function

    return declare if function is None else declare(function)


def spec_of(candidate: object) -> KernelSpec | None:
    """A kernel's spec; None for anything that is no kernel."""
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
                raise _refusal(function, f"array {parameter.name!r} has a default; every array must be given")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            scalars.append(_scalar(function, parameter, hint))
        else:
            raise _refusal(function, f"{parameter} is neither an array by name nor a keyword-only scalar")
    for array in inputs:
        for dim in array.dims:
            if not _INPUT_DIM.match(dim):
                raise _refusal(
                    function, f"axis {dim!r} of {array.name!r} is neither a length, a name, '_', '...' nor '*name'"
                )
    return {"inputs": tuple(inputs), "scalars": tuple(scalars), "outputs": _outputs(function, hints.get("return"))}


def _check_batch(function: Callable[..., Any], spec: KernelSpec) -> None:
    """Calls can run as one where every array has their number of rows first, under one name."""
    if spec.max_batch_size < 1:
        raise _refusal(function, f"max_batch_size is a number of rows, at least 1, not {spec.max_batch_size}")
    arrays = (*spec.inputs, *spec.outputs)
    first = arrays[0].dims[0] if arrays[0].dims else ""
    if not spec.inputs or first == ANY_LENGTH or not _NAME.match(first):
        raise _refusal(function, "with batch=True it takes arrays whose first axis has a name: 'rows' or 'rows n'")
    for array in arrays:
        if array.dims[:1] != (first,) or first in array.dims[1:]:
            raise _refusal(
                function,
                f"with batch=True the first axis of every array and result, and no other, is {first!r}; "
                f"{array.name!r} has {' '.join(array.dims) or 'none'!r}",
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
    # jaxtyping's Shaped has a sentinel here that stands for any dtype; its other types list NumPy's names.
    if not isinstance(wanted, tuple | list):
        return ()
    served = tuple(dtype for dtype in _SERVED if dtype in wanted or (dtype == "bool" and "bool_" in wanted))
    if not served:
        raise _refusal(function, f"{name!r} takes none of the dtypes that are served: {', '.join(_SERVED)}")
    return served


def _scalar(function: Callable[..., Any], parameter: inspect.Parameter, hint: Any) -> ScalarSpec:
    if hint not in _SCALARS:
        raise _refusal(function, f"{parameter.name!r} must be a bool, int, float or str")
    if parameter.name in _RESERVED:
        raise _refusal(function, f"a parameter {parameter.name!r} is the call's own; give it another name")
    required = parameter.default is parameter.empty
    default = None if required else parameter.default
    fitting = (int, float) if hint is float else hint
    if not required and not isinstance(default, fitting):
        raise _refusal(function, f"the default of {parameter.name!r} is no {_SCALARS[hint]}")
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
