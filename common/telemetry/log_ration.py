"""Bounds on the lines of a log, since callers can cause them: some lines a second of each kind.

The log (log.py) applies LogRations to every line, so code that logs needs no bound of its own. A flood of one kind
hides no line of another. The next line of a kind says in `left_out` how many there were besides.
"""

import logging
from time import monotonic

import structlog

from unlatch.common.rates import TokenBucket

_LINES_PER_SECOND = 10.0
# Of these fields the first that a line has is what the line is about. No caller chooses their values.
_SUBJECTS = ("kernel", "replica", "worker", "service", "path", "place")
# Lines of one kind whatever their place is: a caller can cause lines of several places of gRPC.
_WITHOUT_SUBJECT = frozenset({"grpc"})
# Lines with bounds of their own (gateway/calls/call_log.py).
_BOUNDED_ELSEWHERE = frozenset({"call"})
# Replicas come and go. When there have been this many kinds, all begin anew.
_MAX_KINDS = 10_000


class LogRation:
    """Allow `per_second` lines a second; those of one second may come at once. The next line says what was left out."""

    def __init__(self, per_second: float) -> None:
        self._left_out = 0
        self._bucket = TokenBucket(per_second, max(1.0, per_second) if per_second else 0.0, monotonic())

    def has_room(self) -> bool:
        """Whether there may be another line. If not, the line is counted."""
        has_room = self._bucket.take_one(monotonic())
        self._left_out += not has_room
        return has_room

    def left_out(self) -> dict[str, int]:
        """Return a field for the next line: how many lines were left out before it. Empty if there were none."""
        left_out, self._left_out = self._left_out, 0
        return {"left_out": left_out} if left_out else {}


class LogRations(logging.Filter):
    """The rations of one log by kind of line. A processor of structlog, and a filter of the standard library's log.

    A kind is an event and what it is about, or the place in the code for the standard library.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[object, ...], LogRation] = {}

    def __call__(self, _: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        """Return the line, with the number of those before it that were left out. Raises DropEvent to leave it out."""
        name = event["event"]
        if name in _BOUNDED_ELSEWHERE:
            return event
        about = None if name in _WITHOUT_SUBJECT else next(filter(None, map(event.get, _SUBJECTS)), None)
        ration = self._of(name, about)
        if not ration.has_room():
            raise structlog.DropEvent
        return {**event, **ration.left_out()}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line of the standard library's log is written. Its `left_out` says how many before it were not."""
        ration = self._of(record.pathname, record.lineno)
        if not ration.has_room():
            return False
        record.left_out = ration.left_out()
        return True

    def _of(self, *kind: object) -> LogRation:
        if len(self._kinds) >= _MAX_KINDS:
            self._kinds.clear()
        return self._kinds.setdefault(kind, LogRation(_LINES_PER_SECOND))
