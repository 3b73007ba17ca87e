"""A kernel's signature, read from the annotations of a function.

    def f(x: Float64[np.ndarray, "rows cols"], *, eps: float = 1e-9) -> Float64[np.ndarray, "rows"]
          ArraySpec                               ScalarSpec            ArraySpec "output0"

Each error says what to write instead. The decorator adds the place.
"""

import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from unlatch.common.errors import shown
from unlatch.common.kernel.datatypes import DATATYPES
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, ScalarSpec

_INPUT_DIM = re.compile(r"(\d+|\*?[A-Za-z][A-Za-z0-9_]*|_|\.\.\.)\Z")
# jaxtyping binds no name that begins with "_", and "name=4" is 4.
_UNBOUND = re.compile(r"(_\*|\*_|_)\w*\Z")
_NAMED_LENGTH = re.compile(r"\w+=(\d+)\Z")
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}
_INT64_AND_UINT64 = range(-(2**63), 2**64)
# Names that calls and maps of the client use themselves, and the protocol.
_RESERVED = frozenset({"in_flight", "ordered", "priority", "timeout"})
_MAX_ARRAYS = 256
# The order in which dtypes are reported for a kernel that takes several: readers of metadata use the first.
_PREFERENCE = ("float64", "float32", "complex128", "complex64", "int64", "uint8", "bool")
_SERVED = [*_PREFERENCE, *(name for name, _ in DATATYPES.values() if name not in _PREFERENCE)]
# Annotations of Python's own types, and what to write for them.
_INSTEAD = {
    bool: "Bool[np.ndarray, '']",
    int: "Int64[np.ndarray, '']",
    float: "Float64[np.ndarray, '']",
    complex: "Complex128[np.ndarray, '']",
    str: "unlatch.Bytes[np.ndarray, '']",
    bytes: "UInt8[np.ndarray, 'n'], which np.frombuffer makes of bytes",
    dict: "Float64[np.ndarray, 'n'] for each entry: a result of several arrays is a NamedTuple",
}


class DeclarationError(TypeError):
    """A function that cannot be a kernel. The message names its file and line, and what was expected."""


def signature_of(
    function: Callable[..., Any],
) -> tuple[tuple[ArraySpec, ...], tuple[ScalarSpec, ...], tuple[ArraySpec, ...]]:
    """Read a function's arrays, scalars and outputs. Raises DeclarationError, without file and line."""
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise DeclarationError(f"an annotation is not defined: {error}") from None
    inputs: list[ArraySpec] = []
    scalars: list[ScalarSpec] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            scalars.append(_scalar(parameter, hints.get(parameter.name)))
        else:
            inputs.append(_input(parameter, hints.get(parameter.name)))
    if len(inputs) > _MAX_ARRAYS:
        raise DeclarationError(f"a call has at most {_MAX_ARRAYS} arrays, but this kernel takes {len(inputs)}")
    return tuple(inputs), tuple(scalars), _outputs(hints.get("return", inspect.Parameter.empty))


def _input(parameter: inspect.Parameter, hint: Any) -> ArraySpec:
    name = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        raise DeclarationError(
            f"'*{name}' stands for any number of arrays; take one array with one axis more, such as "
            f"{name}: Float64[np.ndarray, 'arrays n']"
        )
    if parameter.kind is parameter.VAR_KEYWORD:
        raise DeclarationError(f"'**{name}' stands for any scalars; name each of them after `*`")
    if name in {"self", "cls"} and hint is None:
        raise DeclarationError(f"{name!r} belongs to a method; a kernel is a function of a module, or a @staticmethod")
    if hint in _SCALARS:
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        raise DeclarationError(
            f"{name!r} is a scalar, and scalars come after `*`: (…, *, {name}: {_SCALARS[hint]}{default})"
        )
    if name in _RESERVED:
        raise DeclarationError(f"the parameter name {name!r} is reserved for calls; choose another name")
    array = _array(name, hint)
    if parameter.default is not parameter.empty:
        raise DeclarationError(f"array {name!r} has a default; arrays are always required")
    for dim in array.dims:
        if not _INPUT_DIM.match(dim):
            raise DeclarationError(f"axis {dim!r} of {name!r} is neither a length, a name, '_', '...' nor '*name'")
    return array


def _scalar(parameter: inspect.Parameter, hint: Any) -> ScalarSpec:
    name = parameter.name
    if hasattr(hint, "dim_str"):
        raise DeclarationError(f"{name!r} is an array, and arrays come before `*`")
    if hint not in _SCALARS:
        none = "; None is not sent: give it a default of its type that means none" if _is_optional(hint) else ""
        raise DeclarationError(f"{name!r} must be a bool, int, float or str, not {_shown(hint)}{none}")
    if name in _RESERVED:
        raise DeclarationError(f"the parameter name {name!r} is reserved for calls; choose another name")
    required = parameter.default is parameter.empty
    default = None if required else _default(name, hint, parameter.default)
    return ScalarSpec(name=name, type=_SCALARS[hint], required=required, default=default)


def _default(name: str, kind: type, given: Any) -> bool | int | float | str:
    """A default in Python's own type: NumPy's scalars and an enum's members are taken for their values."""
    value = plain_value(given)
    fitting = isinstance(value, (int, float) if kind is float else kind)
    if not fitting or (isinstance(value, bool) and kind is not bool):
        raise DeclarationError(f"the default of {name!r} is not of type {_SCALARS[kind]}: {shown(given)}")
    try:
        plain: bool | int | float | str = kind(value)
        if isinstance(plain, str):
            plain.encode()
    except (OverflowError, UnicodeEncodeError):
        raise DeclarationError(f"the default of {name!r} cannot be sent: {shown(given)}") from None
    if kind is float and isinstance(value, int) and plain != value:
        raise DeclarationError(f"the default of {name!r} is an int that no float holds exactly: {shown(given)}")
    if isinstance(plain, int) and plain not in _INT64_AND_UINT64:
        raise DeclarationError(f"the default of {name!r} does not fit in 64 bits: {shown(given)}")
    return plain


def plain_value(given: Any) -> Any:
    """NumPy's scalars as Python's, and anything else as it is."""
    # Arrays have `item` and a length; numbers have no length.
    return given.item() if hasattr(given, "item") and not hasattr(given, "__len__") else given


def _outputs(hint: Any) -> tuple[ArraySpec, ...]:
    if hint is inspect.Parameter.empty:
        raise DeclarationError("the result needs a jaxtyping annotation, or a NamedTuple of them")
    named = getattr(hint, "_fields", None)
    if named is not None:
        fields = get_type_hints(hint)
        return tuple(_array(field, fields.get(field)) for field in named)
    arrays = get_args(hint) if get_origin(hint) is tuple else (hint,)
    if not arrays or Ellipsis in arrays or hint in (None, type(None)):
        raise DeclarationError(
            "the result must be a fixed number of arrays: one, a tuple[…, …] or a NamedTuple of them"
        )
    return tuple(_array(f"output{index}", array, "result") for index, array in enumerate(arrays))


def _array(name: str, hint: Any, role: str = "") -> ArraySpec:
    dims = getattr(hint, "dim_str", None)
    if dims is None:
        known_as = f"; {name!r} is the name of the {role}" if role else ""
        raise DeclarationError(f"{name!r} needs a jaxtyping annotation such as {_instead(hint)}{known_as}")
    if not _is_numpy(hint.array_type):
        raise DeclarationError(f"{name!r} is served as np.ndarray, not as {_shown(hint.array_type)}")
    axes = tuple(map(_axis, dims.split()))
    if sum(axis == ELLIPSIS or axis.startswith("*") for axis in axes) > 1:
        raise DeclarationError(f"{name!r} has more than one '...' or '*name'")
    return ArraySpec(name=name, dtypes=_dtypes(name, hint.dtypes), dims=axes)


def _axis(dim: str) -> str:
    """An axis in the form that calls are checked against."""
    if _UNBOUND.match(dim):
        return ELLIPSIS if "*" in dim else ANY_LENGTH
    length = _NAMED_LENGTH.match(dim)
    return length[1] if length else dim


def _dtypes(name: str, wanted: Any) -> tuple[str, ...]:
    # For jaxtyping's Shaped this is a sentinel that stands for any dtype; for its other types, a list of NumPy's names.
    if not isinstance(wanted, tuple | list):
        return ()
    served = tuple(dtype for dtype in _SERVED if dtype in wanted or f"{dtype}_" in wanted)
    if not served:
        raise DeclarationError(f"{name!r} takes none of the served dtypes: {', '.join(_SERVED)}")
    return served


def _is_numpy(array_type: Any) -> bool:
    kind = get_origin(array_type) or array_type
    return kind is Any or (kind.__module__, kind.__name__) == ("numpy", "ndarray")


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _instead(hint: Any) -> str:
    """Return what to write in place of an annotation that is not jaxtyping's."""
    if _is_optional(hint):
        rest = next(kind for kind in get_args(hint) if kind is not type(None))
        written = _shown(rest) if hasattr(rest, "dim_str") else _instead(rest)
        return f"{written}, without None: arrays are always sent, but may be empty"
    kind, elements = get_origin(hint) or hint, get_args(hint)
    if kind in _INSTEAD:
        return _INSTEAD[kind]
    if kind in (list, tuple, Sequence) and elements and elements[0] in _INSTEAD:
        return _INSTEAD[elements[0]].replace("''", "'n'")
    # NDArray[np.float64] is np.ndarray[…, np.dtype[np.float64]].
    dtype = getattr(next(iter(get_args(elements[-1])), None), "__name__", "") if elements else ""
    known = dtype.capitalize().replace("Uint", "UInt") if dtype in _SERVED else "Float64"
    return f"{known}[np.ndarray, 'rows cols']"


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
