"""Triton's own parameters of a request: what they mean here, and which of them are refused.

The names are reserved in Triton's protocol (its schedule policy, sequence and parameters extensions). A kernel may have
an argument of such a name all the same, but for `priority` and `timeout`: then the parameter is the argument's.
`priority` is taken with the tenant's limits (common/waiting/priority.py).
"""

from unlatch.common.errors import InvalidArgument, Unimplemented, shown
from unlatch.common.kernel.parameters import scalar
from unlatch.protos.unlatch_pb2 import Kernel, Request

_TIMEOUT = "timeout"
_UNIMPLEMENTED = frozenset({"sequence_id", "sequence_start", "sequence_end", "headers"})
_RESERVED_PREFIX = "triton_"


def take_parameters(request: Request, kernel: Kernel, seconds: float | None) -> float | None:
    """Remove Triton's parameters from a request. Raises InvalidArgument, Unimplemented.

    Returns the shorter of `seconds` and the request's own timeout; None if neither sets a limit.
    """
    timeout = _take_timeout(request)
    _refuse_others(request, kernel)
    return min((limit for limit in (seconds, timeout) if limit is not None), default=None)


def _take_timeout(request: Request) -> float | None:
    if _TIMEOUT not in request.parameters:
        return None
    said = scalar(request.parameters[_TIMEOUT])
    del request.parameters[_TIMEOUT]
    if isinstance(said, bool) or not isinstance(said, int) or said < 0:
        raise InvalidArgument(f"{_TIMEOUT}: wanted a whole number of microseconds, got {shown(said)}", field=_TIMEOUT)
    return said / 1e6 or None


def _refuse_others(request: Request, kernel: Kernel) -> None:
    """Refuse what Triton offers and Unlatch does not. A value that asks for nothing, as sequence_id=0, is removed."""
    for name in list(request.parameters):
        reserved = name in _UNIMPLEMENTED or name.startswith(_RESERVED_PREFIX)
        if not reserved or any(argument.name == name for argument in kernel.scalars):
            continue
        if scalar(request.parameters[name]):
            raise Unimplemented(f"{name[:64]}: this parameter of Triton's is not offered", field=name)
        del request.parameters[name]
