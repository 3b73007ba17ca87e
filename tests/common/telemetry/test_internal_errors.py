"""Unexpected exceptions: all are counted, and a flood of them does not fill the log."""

import pytest
from structlog.testing import capture_logs

from unlatch.common.telemetry import log_ration
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder


def test_flood_of_exceptions_fills_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten a second are logged in full, and the next line has how many were left out.

    All are counted. Another place has lines of its own.
    """
    now = 1000.0
    monkeypatch.setattr(log_ration, "monotonic", lambda: now)
    errors = InternalErrors(Recorder())
    with capture_logs([log_ration.LogRations()]) as lines:
        told = [errors.caught("worker_frame", RuntimeError(str(number))) for number in range(3999)]
        errors.caught("timeout", RuntimeError("another place"))
        now += 1.0
        told.append(errors.caught("worker_frame", RuntimeError("a second later")))
    assert [line["place"] for line in lines] == ["worker_frame"] * 10 + ["timeout", "worker_frame"]
    assert [line.get("left_out") for line in lines] == [None] * 11 + [3989]
    assert all(line["exc_info"] is not None for line in lines)
    assert errors._caught.labels("worker_frame").value == 4000
    # Each caller has an id of its own.
    assert len({error.message for error in told}) == 4000
