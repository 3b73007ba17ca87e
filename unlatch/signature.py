"""A kernel's signature, read from the annotations of a function.

    def f(x: Float64[np.ndarray, "rows cols"], *, eps: float = 1e-9) -> Float64[np.ndarray, "rows"]
          ArraySpec                               ScalarSpec            ArraySpec "output0"

An array may be optional (`| None = None`). A scalar may be a `Literal` or an `Enum`, which are choices, or a list.

Each error says what to write instead. The decorator adds the place.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args, get_origin, get_type_hints

from unlatch.common.kernel.datatypes import DATATYPES
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, ScalarSpec
from unlatch.hints import DeclarationError, check_name, is_optional, without_none, written
from unlatch.scalars import SCALARS, check_size, element_of, is_choice, scalar_spec

_INPUT_DIM = re.compile(r"(\d+|\*?[A-Za-z][A-Za-z0-9_]*|_|\.\.\.)\Z")
# jaxtyping binds no name that begins with "_", and "name=4" is 4.
_UNBOUND = re.compile(r"(_\*|\*_|_)\w*\Z")
_NAMED_LENGTH = re.compile(r"\w+=(\d+)\Z")
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
    str: "unlatch.Str[np.ndarray, '']",
    bytes: "UInt8[np.ndarray, 'n'], which np.frombuffer makes of bytes",
    dict: "Float64[np.ndarray, 'n'] for each entry: a result of several arrays is a NamedTuple",
}


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
            scalars.append(scalar_spec(parameter, hints.get(parameter.name)))
        else:
            inputs.append(_input(parameter, hints.get(parameter.name)))
    check_size(scalars)
    if len(inputs) > _MAX_ARRAYS:
        raise DeclarationError(f"a call has at most {_MAX_ARRAYS} arrays, but this kernel takes {len(inputs)}")
    return tuple(inputs), tuple(scalars), _outputs(hints.get("return", inspect.Parameter.empty))


def _input(parameter: inspect.Parameter, hint: Any) -> ArraySpec:
    name = parameter.name
    _refuse_what_is_no_array(parameter, hint)
    check_name(name)
    present = without_none(hint)
    optional = present is not hint and hasattr(present, "dim_str")
    array = _array(name, present if optional else hint)
    if optional != (parameter.default is None) or (not optional and parameter.default is not parameter.empty):
        what = "may be None, so it needs that default" if optional else "has a default, so it must be optional"
        raise DeclarationError(f"array {name!r} {what}: {name}: {written(present)} | None = None")
    for dim in array.dims:
        if not _INPUT_DIM.match(dim):
            raise DeclarationError(f"axis {dim!r} of {name!r} is neither a length, a name, '_', '...' nor '*name'")
    return replace(array, optional=optional)


def _refuse_what_is_no_array(parameter: inspect.Parameter, hint: Any) -> None:
    """Refuse parameters before `*` that are no array, and say where they belong."""
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
    if hint in SCALARS or is_choice(hint):
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        raise DeclarationError(
            f"{name!r} is a scalar, and scalars come after `*`: (…, *, {name}: {written(hint)}{default})"
        )
    sequence, one = element_of(hint)
    if sequence is not None and (one in SCALARS or is_choice(one)):
        raise DeclarationError(
            f"{name!r} needs a jaxtyping annotation such as {_instead(hint)}; "
            f"a short list may also come after `*`: (…, *, {name}: {written(hint)})"
        )


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
        raise DeclarationError(f"{name!r} is served as np.ndarray, not as {written(hint.array_type)}")
    axes = tuple(map(_axis, dims.split()))
    if sum(axis == ELLIPSIS or axis.startswith("*") for axis in axes) > 1:
        raise DeclarationError(f"{name!r} has more than one '...' or '*name'")
    # By name, since the class itself brings jaxtyping, and with it NumPy.
    text = (hint.dtype.__module__, hint.dtype.__name__) == ("unlatch.annotations", "Str")
    return ArraySpec(name=name, dtypes=_dtypes(name, hint.dtypes), dims=axes, text=text)


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


def _instead(hint: Any) -> str:
    """Return what to write in place of an annotation that is not jaxtyping's."""
    if is_optional(hint):
        rest = next(kind for kind in get_args(hint) if kind is not type(None))
        return f"{written(rest) if hasattr(rest, 'dim_str') else _instead(rest)}, without None"
    kind, elements = get_origin(hint) or hint, get_args(hint)
    if kind in _INSTEAD:
        return _INSTEAD[kind]
    if kind in (list, tuple, Sequence) and elements and elements[0] in _INSTEAD:
        return _INSTEAD[elements[0]].replace("''", "'n'")
    # NDArray[np.float64] is np.ndarray[…, np.dtype[np.float64]].
    dtype = getattr(next(iter(get_args(elements[-1])), None), "__name__", "") if elements else ""
    known = dtype.capitalize().replace("Uint", "UInt") if dtype in _SERVED else "Float64"
    return f"{known}[np.ndarray, 'rows cols']"
