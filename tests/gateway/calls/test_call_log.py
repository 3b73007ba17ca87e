"""The log's line a call: how many there are, and what is said of those that have none."""

import pytest
from structlog.testing import capture_logs

from unlatch.common.telemetry import log_ration
from unlatch.gateway.calls.call_log import CallLog


def test_next_line_counts_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past so many a second calls are counted, and the line after them says how many; good calls and others apart."""
    now = 1000.0
    monkeypatch.setattr(log_ration, "monotonic", lambda: now)
    log, had_room = CallLog(calls_per_second=10, failures_per_second=0), 0
    while log.has_room("OK"):
        had_room += 1
    assert had_room == 10
    assert not log.has_room("NOT_FOUND")
    now += 0.2
    with capture_logs() as lines:
        assert log.has_room("OK")
        log.tell("OK", {"kernel": "identity"})
        log.tell("OK", {"kernel": "identity"})
    assert lines[0]["left_out"] >= 1
    assert lines[1:] == [{"event": "call", "log_level": "info", "code": "OK", "kernel": "identity"}]
