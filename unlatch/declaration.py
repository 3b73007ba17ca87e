"""`@kernel`: the decorator that declares a NumPy function to be a kernel, with its signature as the contract.

    @kernel(pure=True)
    def normalise(x: Float64[np.ndarray, "rows cols"], *, eps: float = 1e-9) -> Float64[np.ndarray, "rows cols"]:
        ...

Array arguments come first and have jaxtyping annotations; keyword-only arguments are scalars. The function itself is
not changed: it can be called, tested and imported without a running Unlatch.
"""

import inspect
import keyword
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar, overload

from unlatch.common.errors import KernelError, shown
from unlatch.common.kernel.spec import ANY_LENGTH, KernelSpec
from unlatch.signature import DeclarationError, plain_value, signature_of

__all__ = ["DeclarationError", "KernelError", "function_of", "kernel", "place_of", "spec_of"]

F = TypeVar("F", bound=Callable[..., Any])

_SPEC = "__unlatch_kernel__"
# The attribute of a module that lists its declared kernels, in order.
DECLARED = "__unlatch_declared__"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
# The client has methods of these names, so no call by attribute would reach such a kernel.
TAKEN = frozenset({"call", "close", "kernels", "map"})
# The calls of an `async def` kernel that one worker runs at once, by default.
_CONCURRENCY = 1000
# A worker reports a kernel in one frame.
_MAX_TEXT_BYTES = 48 * 1024


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
    nonempty: bool = False,
    timeout: float | None = None,
    memory: int | None = None,
    concurrency: int | None = None,
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
    nonempty: bool = False,
    timeout: float | None = None,
    memory: int | None = None,
    concurrency: int | None = None,
) -> F | Callable[[F], F]:
    """Declare a NumPy function to be a kernel.

    - `name`: the name that callers use; by default the function's name.
    - `version`: an opaque string that callers may ask for.
    - `pure`: the result depends on the arguments only, so a call may be run again if its worker dies.
    - `batch`, `max_batch_size`: the first axis of every array and result is a batch, and each row's result depends on
      that row only; waiting calls are run as one, with up to `max_batch_size` rows.
    - `nonempty`: every array must have at least one element.
    - `timeout`: maximum seconds of one run.
    - `memory`: maximum bytes that one run needs.
    - `concurrency`: of an `async def` kernel, how many of its calls one async worker runs at once; by default 1000.

    Raises DeclarationError if the function cannot be a kernel.
    """

    def declare(function: F) -> F:
        try:
            plain = function_of(function)
            inputs, scalars, outputs = signature_of(plain)
            spec = KernelSpec(
                name=plain.__name__ if name is None else name,
                version=version,
                doc=inspect.getdoc(plain) or "",
                inputs=inputs,
                scalars=scalars,
                outputs=outputs,
                pure=pure,
                batch=batch,
                max_batch_size=plain_value(max_batch_size),
                nonempty=nonempty,
                timeout_seconds=plain_value(timeout),
                memory_bytes=plain_value(memory),
                concurrency=_concurrency(function, plain_value(concurrency)),
            )
            _check_options(spec)
            if batch:
                _check_batch(spec)
        except DeclarationError as error:
            called = getattr(function, "__name__", type(function).__name__)
            raise DeclarationError(f"{place_of(function)}: kernel {called}: {error}") from None
        setattr(function, _SPEC, spec)
        # A second function with the same name replaces the first in its module, but not in this list.
        plain.__globals__.setdefault(DECLARED, []).append(function)
        return function

    return declare if function is None else declare(function)


def spec_of(candidate: object) -> KernelSpec | None:
    """The spec of a kernel; None for any other object."""
    spec = getattr(candidate, _SPEC, None)
    return spec if isinstance(spec, KernelSpec) else None


def function_of(candidate: Any) -> Any:
    """The plain function within what functools.wraps or numba has made of it. Raises DeclarationError if none is."""
    plain = inspect.unwrap(candidate)
    # Cython's functions have both attributes too, but so have bound methods.
    if inspect.ismethod(plain) or not (hasattr(plain, "__code__") and hasattr(plain, "__globals__")):
        raise DeclarationError(f"a {type(plain).__name__} is not a function; write a function with `def` that calls it")
    outer = candidate if inspect.isfunction(candidate) else plain
    if inspect.isgeneratorfunction(outer) or inspect.isasyncgenfunction(outer):
        raise DeclarationError("a generator is not served; return one array that has all items")
    return plain


def is_async(candidate: Any) -> bool:
    """Whether a function, as its decorators have left it, is an `async def` function."""
    return inspect.iscoroutinefunction(candidate if inspect.isfunction(candidate) else inspect.unwrap(candidate))


def place_of(candidate: Any) -> str:
    """The file and line of a function's definition. For any other object, the line that calls the decorator."""
    plain = inspect.unwrap(candidate)
    if inspect.isfunction(plain):
        return f"{plain.__code__.co_filename}:{plain.__code__.co_firstlineno}"
    caller = next(frame for frame in inspect.stack(0) if frame.filename != __file__)
    return f"{caller.filename}:{caller.lineno}"


def _concurrency(function: Any, given: Any) -> Any:
    if is_async(function):
        return _CONCURRENCY if given is None else given
    _require(given is None, "concurrency= is for `async def` kernels; a worker runs one call at a time of any other")
    return None


def _check_options(spec: KernelSpec) -> None:
    _require(isinstance(spec.name, str) and _NAME.match(spec.name), f"name={shown(spec.name)} is not an identifier")
    _require(not keyword.iskeyword(spec.name), f"the name {spec.name!r} is a keyword of Python; set another: name=…")
    _require(spec.name not in TAKEN, f"the name {spec.name!r} is a method of the client; set another: name=…")
    _require(isinstance(spec.version, str), f"version={shown(spec.version)} is not a str")
    for option in ("pure", "batch", "nonempty"):
        value = getattr(spec, option)
        _require(isinstance(value, bool), f"{option}={shown(value)} is not a bool")
    timeout, memory, rows = spec.timeout_seconds, spec.memory_bytes, spec.max_batch_size
    _require(timeout is None or _is_time(timeout), f"timeout={shown(timeout)} is not a number of seconds above 0")
    _require(
        memory is None or _is_count(memory, 2**63), f"memory={shown(memory)} is not a whole number of bytes above 0"
    )
    _require(_is_count(rows, 2**31), f"max_batch_size={shown(rows)} is not a whole number above 0")
    if spec.concurrency is not None:
        _check_async(spec)
    try:
        size = len(spec.doc.encode()) + len(spec.version.encode())
    except UnicodeEncodeError:
        raise DeclarationError("the docstring or the version cannot be encoded in UTF-8") from None
    _require(size <= _MAX_TEXT_BYTES, f"docstring and version have {size} bytes, more than {_MAX_TEXT_BYTES}")


def _check_async(spec: KernelSpec) -> None:
    calls = spec.concurrency
    _require(_is_count(calls, 2**20), f"concurrency={shown(calls)} is not a whole number from 1 to {2**20 - 1}")
    _require(
        not spec.batch, "batch=True joins calls in one run; an `async def` kernel runs its calls at once without it"
    )
    _require(spec.memory_bytes is None, "memory= limits a process that runs one call; an async worker runs many")


def _require(holds: object, why: str) -> None:
    if not holds:
        raise DeclarationError(why)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < limit


def _check_batch(spec: KernelSpec) -> None:
    """Check that every array's first axis is the batch, under one name, so that calls can run as one."""
    arrays = (*spec.inputs, *spec.outputs)
    first = arrays[0].dims[0] if arrays[0].dims else ""
    if not spec.inputs or first == ANY_LENGTH or not _NAME.match(first):
        raise DeclarationError("batch=True needs arrays whose first axis has a name: 'rows' or 'rows n'")
    for array in arrays:
        if array.dims[:1] != (first,) or first in array.dims[1:]:
            raise DeclarationError(
                f"with batch=True the first axis of every array and result, and no other, must be {first!r}; "
                f"{array.name!r} has {' '.join(array.dims) or 'no axis'!r}"
            )
