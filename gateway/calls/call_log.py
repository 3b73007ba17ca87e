"""The log's line a call: which it was, what came of it, and where its time went.

A line costs the loop some 30 µs and its reader 400 bytes, so there are so many a second and no more: of calls that went
well a sample, of those that did not all, as long as they are not a flood. The next line says how many were left out.
"""

from collections.abc import Mapping
from time import monotonic

import structlog

log = structlog.get_logger()

Fields = Mapping[str, str | int | float]


class CallLog:
    """`calls_per_second` bounds the lines of calls that ended OK, `failures_per_second` those of all others."""

    def __init__(self, calls_per_second: float, failures_per_second: float) -> None:
        self._calls = _Ration(calls_per_second)
        self._failures = _Ration(failures_per_second)

    def has_room(self, code: str) -> bool:
        """Whether a call that ended so is told of; where it is not, it is counted."""
        return (self._calls if code == "OK" else self._failures).take()

    def tell(self, code: str, fields: Fields) -> None:
        """Write the line."""
        ration, write = (self._calls, log.info) if code == "OK" else (self._failures, log.warning)
        left_out, ration.left_out = ration.left_out, 0
        write("call", code=code, **fields, **({"left_out": left_out} if left_out else {}))


class _Ration:
    """So many a second; those of one second may come at once."""

    def __init__(self, per_second: float) -> None:
        self.left_out = 0
        self._per_second = per_second
        self._most = max(1.0, per_second) if per_second else 0.0
        self._left = self._most
        self._at = monotonic()

    def take(self) -> bool:
        now = monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            self.left_out += 1
            return False
        self._left -= 1
        return True
