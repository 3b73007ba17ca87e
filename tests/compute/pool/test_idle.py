"""An idle pool costs little: looks at it are rare, and become frequent with the first run."""

from itertools import pairwise
from typing import Any, cast

import pytest

from tests.compute.dispatch.test_machine import KERNELS, stopped
from tests.support.dispatch import Desk, Loop, array, stand_in
from unlatch.compute.pool.slot import Slot
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings

WORKERS = 2


class Counter:
    """Counts the calls of a method."""

    def __init__(self, patch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.count = 0
        real = getattr(where, name)

        def counted(*given: Any) -> Any:
            self.count += 1
            return real(*given)

        patch.setattr(where, name, counted)

    def within(self, loop: Loop, seconds: float) -> int:
        """Return the number of calls while this time passes."""
        before = self.count
        for _ in range(round(seconds / 0.025)):
            loop.advance(0.025)
        return self.count - before


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A dispatcher whose workers are up, and a loop with a time of its own."""
    loop = Loop()
    stand_in(monkeypatch, loop)
    settings = {"stopped_worker_seconds": 0}
    desk = loop.do(lambda: Desk(WORKERS, kernels=KERNELS, clock=loop.clock, settings=settings))
    loop.create_task(desk.start())
    loop.rounds()
    return desk


def test_idle_pool_is_looked_at_once_a_second(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds without a run the memory of workers is read once a second, and from the next run on often."""
    looks, loop = Counter(monkeypatch, Slot, "look"), desk.loop
    with stopped(desk, loop):
        assert looks.within(loop, 5.0) >= 40 * WORKERS
        looks.within(loop, 10.0)
        assert 4 * WORKERS <= looks.within(loop, 5.0) <= 6 * WORKERS
        loop.do(lambda: desk.sent(array(), spec=KERNELS[0]))
        assert looks.within(loop, 1.0) >= 9 * WORKERS


def test_idle_pool_is_reported_at_the_interval_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle pool is looked at once for each report. A run is seen at once, and reports keep their interval."""
    looks, loop, reports = Counter(monkeypatch, Reports, "is_due"), desk.loop, []

    class Lanes:
        def report(self) -> None:
            reports.append(loop.now)

    with stopped(desk, loop):
        settings = ComputeSettings.model_validate({"workers": WORKERS})
        found = loop.do(lambda: Reports(desk.pool, desk.dispatcher, settings, desk.errors))
        task = loop.create_task(found.run(cast("Any", Lanes())))
        assert looks.within(loop, 5.0) <= 22
        assert len(reports) >= 18
        looks.within(loop, 0.1)
        before = looks.count
        loop.do(lambda: desk.sent(array(), spec=KERNELS[0]))
        assert looks.count == before + 1
        assert looks.within(loop, 1.0) >= 36
        assert max(late - early for early, late in pairwise(reports)) <= 0.25 + 0.06
        task.cancel()
        loop.rounds()
