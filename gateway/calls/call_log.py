"""The call log: one line for a call, with its kernel, its status and where its time went.

A line costs the loop some 30 µs and 400 bytes of log, so their number a second is bounded: calls that ended OK are
sampled, those that did not are all logged, as long as they are not a flood. The next line says how many were left out.
"""

from collections.abc import Mapping
from time import monotonic

import structlog

from unlatch.common.rates import TokenBucket

log = structlog.get_logger()

Fields = Mapping[str, str | int | float]


class CallLog:
    """`calls_per_second` bounds the lines of calls that ended OK, `failures_per_second` those of all others."""

    def __init__(self, calls_per_second: float, failures_per_second: float) -> None:
        self._calls = _Ration(calls_per_second)
        self._failures = _Ration(failures_per_second)

    def has_room(self, code: str) -> bool:
        """Whether a call that ended with `code` gets a line; it is counted where it does not."""
        return (self._calls if code == "OK" else self._failures).take()

    def tell(self, code: str, fields: Fields) -> None:
        """Write the line of a call."""
        ration, write = (self._calls, log.info) if code == "OK" else (self._failures, log.warning)
        left_out, ration.left_out = ration.left_out, 0
        write("call", code=code, **fields, **({"left_out": left_out} if left_out else {}))


class _Ration:
    """A bound on lines a second; those of one second may come at once."""

    def __init__(self, per_second: float) -> None:
        self.left_out = 0
        self._bucket = TokenBucket(per_second, max(1.0, per_second) if per_second else 0.0, monotonic())

    def take(self) -> bool:
        """Whether there may be another line; it is counted where there may not."""
        has_room = self._bucket.take_one(monotonic())
        self.left_out += not has_room
        return has_room
