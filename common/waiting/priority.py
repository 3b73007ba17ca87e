"""A call's priority: a parameter of the protocol that is none of its kernel's."""

from unlatch.common.errors import InvalidArgument, shown
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
# Triton's numbers for them: 1 is the highest.
_NUMBERS = dict(enumerate(NAMES.values(), 1))


def take_priority(request: Request) -> Priority.ValueType | None:
    """Remove the priority from a request's parameters and return it; None for the default. Raises InvalidArgument.

    The priority is a name, or a number as Triton's clients send it: 0 and a number without a level mean the default.
    """
    if PARAMETER not in request.parameters:
        return None
    said = scalar(request.parameters[PARAMETER])
    del request.parameters[PARAMETER]
    if isinstance(said, int) and not isinstance(said, bool) and said >= 0:
        return _NUMBERS.get(said)
    if not isinstance(said, str) or said not in NAMES:
        raise InvalidArgument(
            f"{PARAMETER}: wanted {' or '.join(NAMES)}, or a number from 1 to {len(NAMES)}, got {shown(said)}",
            field=PARAMETER,
        )
    return NAMES[said]
