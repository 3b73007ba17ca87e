"""How a kernel learns that nobody waits for its result any more."""

from collections.abc import Callable

# A worker puts in whom to ask.
asked_of: Callable[[], bool] = bool


def cancelled() -> bool:
    """Whether nobody waits for the call that runs now: its caller has left, or its time is over.

    A kernel that works for long asks now and then (it costs a microsecond or two) and returns or raises early, which
    spares its worker: one that goes on is killed when `kill_grace_seconds` are over, and replaced. Outside of a worker
    it is always False.
    """
    return asked_of()
