"""Exceptions that no code expected: each is counted and logged with its traceback, and the service goes on.

Every entry point of a service's bookkeeping (a frame, a message, a timer, the end of a task) ends in one guard: it
settles the calls that it held with the error that `caught` gives, and returns. So a mistake costs the calls in hand,
never the loop, the lane or the worker that brought them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from unlatch.common.errors import Internal, opaque
from unlatch.common.telemetry.recorder import Recorder

log = structlog.get_logger()


class InternalErrors:
    """Counts and logs unexpected exceptions by the place where they were caught."""

    def __init__(self, recorder: Recorder) -> None:
        self._caught = recorder.counter(
            "unlatch_internal_errors_total", "Unexpected exceptions that the service survived.", ("place",)
        )

    def caught(self, place: str, error: BaseException) -> Internal:
        """Count and log `error`; returns what a caller is told of it: an id to find the log entry by.

        `place` is a snake_case code of the entry point, for example `worker_frame`.
        """
        told, identity = opaque(f"an internal error in {place}")
        self._caught.labels(place).add()
        log.error("internal error", place=place, id=identity, exc_info=error)
        return told

    @contextmanager
    def guarded(self, place: str) -> Iterator[None]:
        """Survive an exception in the block, where there is no caller to tell: count it, log it and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (counted and logged)
            self.caught(place, error)
