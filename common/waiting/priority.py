"""A call's priority: a parameter of the protocol that is none of its kernel's."""

from unlatch.common.errors import InvalidArgument
from unlatch.common.kernel.parameters import scalar
from unlatch.protos.unlatch_pb2 import Priority, Request

PARAMETER = "priority"
NORMAL = Priority.NORMAL
NAMES = {
    "interactive": Priority.INTERACTIVE,
    "normal": NORMAL,
    "background": Priority.BACKGROUND,
}
# The lower the sooner.
RANKS = {priority: rank for rank, priority in enumerate(NAMES.values())}


def take_priority(request: Request) -> Priority.ValueType:
    """Remove the priority from a request's parameters and return it. Raises InvalidArgument."""
    if PARAMETER not in request.parameters:
        return NORMAL
    said = scalar(request.parameters[PARAMETER])
    del request.parameters[PARAMETER]
    if not isinstance(said, str) or said not in NAMES:
        raise InvalidArgument(f"{PARAMETER}: wanted {' or '.join(NAMES)}, got {said!r:.64}", field=PARAMETER)
    return NAMES[said]
