"""Annotations and defaults, whatever they are of: what they allow, and how they are written."""

import re
import types
from typing import Any, Union, get_args, get_origin

# Names that calls and maps of the client use themselves, and the protocol.
_RESERVED = frozenset({"in_flight", "ordered", "priority", "timeout"})


class DeclarationError(TypeError):
    """A function that cannot be a kernel. The message names its file and line, and what was expected."""


def check_name(name: str) -> None:
    """Refuse the name of an argument that calls use themselves."""
    if name in _RESERVED:
        raise DeclarationError(f"the parameter name {name!r} is reserved for calls; choose another name")


def plain_value(given: Any) -> Any:
    """NumPy's scalars as Python's, and anything else as it is."""
    # Arrays have `item` and a length; numbers have no length.
    return given.item() if hasattr(given, "item") and not hasattr(given, "__len__") else given


def is_optional(hint: Any) -> bool:
    """Whether an annotation allows None."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def without_none(hint: Any) -> Any:
    """Return what an optional annotation is besides None; any other annotation as it is."""
    if not is_optional(hint):
        return hint
    rest = [kind for kind in get_args(hint) if kind is not type(None)]
    return rest[0] if len(rest) == 1 else hint


def written(hint: Any) -> str:
    """An annotation as its author would write it."""
    # list[float] is a type too, and its name is only "list".
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"\btyping\.", "", str(hint))
