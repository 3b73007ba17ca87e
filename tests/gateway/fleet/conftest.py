"""The clock by which a gateway estimates what replicas have to do, for tests that move it."""

import pytest


class Clock:
    """The clock of windows, which a test moves."""

    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("unlatch.gateway.fleet.window.monotonic", lambda: clock.now)
    return clock
