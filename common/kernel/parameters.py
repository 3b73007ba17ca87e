"""Conversion of scalars: Python's bool, int, float and str to the protocol's InferParameter, and back."""

from unlatch.common.errors import shown
from unlatch.common.kernel.lists import Value
from unlatch.protos.unlatch_pb2 import Parameter

_INT64 = range(-(2**63), 2**63)


def parameter(value: Value) -> Parameter:
    """Convert a scalar to a message. Raises OverflowError for an int of over 64 bits, TypeError for other types."""
    if isinstance(value, bool):
        return Parameter(bool_param=value)
    if isinstance(value, int):
        return Parameter(int64_param=value) if value in _INT64 else Parameter(uint64_param=_unsigned(value))
    if isinstance(value, float):
        return Parameter(double_param=value)
    if isinstance(value, str):
        return Parameter(string_param=value)
    raise TypeError(f"wanted a bool, int, float or str parameter, got the type {type(value).__name__}")


def scalar(message: Parameter) -> Value | None:
    """The scalar in a message; None if it holds none."""
    choice = message.WhichOneof("value")
    value: Value | None = getattr(message, choice) if choice else None
    return value


def _unsigned(value: int) -> int:
    if not 0 <= value < 2**64:
        raise OverflowError(f"{shown(value)} does not fit in 64 bits")
    return value
