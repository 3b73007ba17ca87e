"""The call log: one line for a call, with its kernel, its status and where its time went.

A line costs the loop some 30 µs and 400 bytes of log, so their number a second is bounded: calls that ended OK are
sampled, those that did not are all logged, as long as they are not a flood. The next line says how many were left out.
"""

from collections.abc import Mapping

import structlog

from unlatch.common.telemetry.log_ration import LogRation

log = structlog.get_logger()

Fields = Mapping[str, str | int | float]


class CallLog:
    """`calls_per_second` bounds the lines of calls that ended OK, `failures_per_second` those of all others."""

    def __init__(self, calls_per_second: float, failures_per_second: float) -> None:
        self._calls = LogRation(calls_per_second)
        self._failures = LogRation(failures_per_second)

    def has_room(self, code: str) -> bool:
        """Whether a call that ended with `code` gets a line; it is counted where it does not."""
        return (self._calls if code == "OK" else self._failures).has_room()

    def tell(self, code: str, fields: Fields) -> None:
        """Write the line of a call."""
        ration, write = (self._calls, log.info) if code == "OK" else (self._failures, log.warning)
        write("call", code=code, **fields, **ration.left_out())
