"""Cancellation, as a kernel sees it: whether a result is still wanted."""

from collections.abc import Callable

# A worker sets this to its own function.
asked_of: Callable[[], bool] = bool


def cancelled() -> bool:
    """Whether the current call has been cancelled: its caller has left, or its deadline has passed.

    A long-running kernel should ask now and then (each time costs a microsecond or two) and return or raise early. That
    saves its worker: if the kernel goes on, the worker is killed after `kill_grace_seconds` and replaced. Outside of a
    worker the answer is always False.
    """
    return asked_of()
