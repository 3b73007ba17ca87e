"""The scalars of a kernel's signature: keyword-only parameters, each a scalar, one of several choices, or a list.

    *, eps: float = 1e-9, kind: Literal["linear", "cubic"], mode: Mode, weights: list[float] = ()
       a scalar           choices                           an Enum     a list

A kernel gets members of its Enum and the kind of sequence that it declares; calls carry the values.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum, Flag
from math import isnan
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unlatch.common.errors import shown
from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.spec import ScalarSpec
from unlatch.hints import DeclarationError, check_name, is_optional, plain_value, without_none, written

SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}
_INT64_AND_UINT64 = range(-(2**63), 2**64)
# A worker reports a kernel in one frame, beside its docstring.
_MAX_VALUES_BYTES = 8 * 1024


def scalar_spec(parameter: inspect.Parameter, hint: Any) -> ScalarSpec:
    """Read a keyword-only parameter. Raises DeclarationError."""
    name = parameter.name
    if hasattr(without_none(hint), "dim_str"):
        raise DeclarationError(f"{name!r} is an array, and arrays come before `*`")
    sequence, one = element_of(hint)
    kind, choices = _choices(name, one) if is_choice(one) else (one, ())
    if kind not in SCALARS:
        raise DeclarationError(f"{name!r} must be a bool, int, float or str, not {written(hint)}{_instead_of(hint)}")
    check_name(name)
    required = parameter.default is parameter.empty
    spec = ScalarSpec(
        name=name, type=SCALARS[kind], required=required, default=None, choices=choices, many=sequence is not None
    )
    return spec if required else replace(spec, default=_default(spec, one, kind, parameter.default))


def element_of(hint: Any) -> tuple[Any, Any]:
    """Return the kind of sequence that a list is declared as, and its elements' type; None and the hint for others."""
    origin, elements = get_origin(hint), get_args(hint)
    if origin in (list, Sequence) and len(elements) == 1:
        return origin, elements[0]
    if origin is tuple and len(elements) == 2 and elements[1] is Ellipsis:
        return origin, elements[0]
    return None, hint


def is_choice(hint: Any) -> bool:
    """Whether an annotation is a Literal or an Enum."""
    return get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, Enum))


def _choices(name: str, hint: Any) -> tuple[Any, tuple[Value, ...]]:
    """Return the type of the choices of a Literal or an Enum, and their values. Raises DeclarationError."""
    values = _values_of_members(name, hint) if isinstance(hint, type) else _values_of_literal(name, hint)
    # A class of its own (StrEnum, np.str_) counts as the type that it extends; bool comes before int.
    kinds = {next((kind for kind in SCALARS if isinstance(value, kind)), type(value)) for value in values}
    if len(kinds) != 1 or not kinds <= SCALARS.keys():
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise DeclarationError(f"the choices of {name!r} must be all bool, all int, all float or all str, not {found}")
    (kind,) = kinds
    return kind, tuple(_sent(name, kind, value, "a choice") for value in values)


def _values_of_members(name: str, hint: type[Enum]) -> list[Any]:
    if issubclass(hint, Flag):
        raise DeclarationError(f"{name!r} is a Flag, whose members are combined; take an int, or a bool for each")
    values = [plain_value(member.value) for member in hint]
    if any(isinstance(value, float) and isnan(value) for value in values):
        raise DeclarationError(f"NaN cannot be a choice of {name!r}, since it is equal to nothing")
    return values


def _values_of_literal(name: str, hint: Any) -> list[Any]:
    for value in get_args(hint):
        if isinstance(value, Enum):
            kind = type(value).__name__
            raise DeclarationError(f"{name!r} has members of an Enum in a Literal; annotate it as {kind}")
    return list(get_args(hint))


def _default(spec: ScalarSpec, hint: Any, kind: type, given: Any) -> Value | tuple[Value, ...]:
    """A default as plain data: NumPy's scalars and an enum's members are taken for their values."""
    if not spec.many:
        return _single_default(spec, hint, kind, given)
    if not isinstance(given, list | tuple):
        raise DeclarationError(f"the default of {spec.name!r} is not a list or tuple: {shown(given)}")
    return tuple(_single_default(spec, hint, kind, one) for one in given)


def _single_default(spec: ScalarSpec, hint: Any, kind: type, given: Any) -> Value:
    if isinstance(hint, type) and issubclass(hint, Enum):
        if not isinstance(given, hint):
            raise DeclarationError(f"the default of {spec.name!r} is no member of {hint.__name__}: {shown(given)}")
        given = given.value
    value = _sent(spec.name, kind, given, "the default")
    if spec.choices and value not in spec.choices:
        wanted = ", ".join(map(repr, spec.choices))
        raise DeclarationError(f"the default of {spec.name!r} is none of {wanted}: {shown(given)}")
    return value


def _sent(name: str, kind: type, given: Any, what: str) -> Value:
    """A value in Python's own type, which a call can carry. Raises DeclarationError."""
    value = plain_value(given)
    fitting = isinstance(value, (int, float) if kind is float else kind)
    if not fitting or (isinstance(value, bool) and kind is not bool):
        raise DeclarationError(f"{what} of {name!r} is not of type {SCALARS[kind]}: {shown(given)}")
    try:
        plain: Value = kind(value)
        if isinstance(plain, str):
            plain.encode()
    except (OverflowError, UnicodeEncodeError):
        raise DeclarationError(f"{what} of {name!r} cannot be sent: {shown(given)}") from None
    if kind is float and isinstance(value, int) and plain != value:
        raise DeclarationError(f"{what} of {name!r} is an int that no float holds exactly: {shown(given)}")
    if isinstance(plain, int) and plain not in _INT64_AND_UINT64:
        raise DeclarationError(f"{what} of {name!r} does not fit in 64 bits: {shown(given)}")
    return plain


def check_size(scalars: Iterable[ScalarSpec]) -> None:
    """Refuse choices and lists that would not fit beside the rest of a kernel's description."""
    size = sum(len(repr((one.choices, one.default)).encode()) for one in scalars if one.choices or one.many)
    if size > _MAX_VALUES_BYTES:
        raise DeclarationError(f"choices and lists have {size} bytes as Python code, more than {_MAX_VALUES_BYTES}")


def scalar_conversions(function: Callable[..., Any]) -> dict[str, Callable[[Any], Any]]:
    """Return what makes the declared objects of scalars' values, by name: members of enums, and tuples.

    Other scalars need none. The function must be one that `signature_of` takes.
    """
    hints = get_type_hints(function)
    conversions: dict[str, Callable[[Any], Any]] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        hint = hints[parameter.name]
        sequence, one = element_of(hint)
        member = one if isinstance(one, type) and issubclass(one, Enum) else None
        if sequence is not None and (member or sequence is not list):
            conversions[parameter.name] = _Elements(list if sequence is list else tuple, member)
        elif member:
            conversions[parameter.name] = member
    return conversions


class _Elements:
    """The conversion of a list: to a list or tuple, of members of an enum if there is one."""

    def __init__(self, kind: type, member: type[Enum] | None) -> None:
        self._kind = kind
        self._member = member

    def __call__(self, values: Iterable[Any]) -> Any:
        return self._kind(values if self._member is None else map(self._member, values))


def _instead_of(hint: Any) -> str:
    """Return what to write in place of a scalar's annotation, after a semicolon; "" if that is not known."""
    if is_optional(hint):
        return "; None is not sent: give it a default of its type that means none"
    if hint in (list, tuple, Sequence):
        return "; say of what, as in list[float]"
    if hint is bytes:
        return "; take an array before `*`: unlatch.Bytes[np.ndarray, '']"
    if get_origin(hint) is tuple:
        return "; take any number of one type, as in tuple[int, ...], or each by its own name"
    return ""
