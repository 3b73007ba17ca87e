"""What waits, by turns: whom a refusal costs nothing, and that none is forgotten."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.compute.intake.test_poison import Ward
from tests.support.watching import until
from unlatch.common.errors import ResourceExhausted, Unavailable
from unlatch.common.waiting.order import Policy
from unlatch.compute.call import Call

A = np.arange(3.0)


class Workers:
    """Workers that take so many calls, and end none."""

    keeps_some_free = False

    def __init__(self, room: int, *, replies: bool = True) -> None:
        self.given: list[Call] = []
        self._room = room
        self._replies = replies

    def has_room(self, *, long: bool) -> bool:  # noqa: ARG002 (Workers)
        return len(self.given) < self._room

    def wait_seconds(self, before: float, *, short: bool) -> float:  # noqa: ARG002 (Workers)
        return before

    def run(self, calls: Sequence[Call]) -> None:
        if not self._replies:
            raise ResourceExhausted("no memory for replies")
        self.given += calls

    def abandon(self, call: Call) -> None:
        raise AssertionError(f"{call} was to be left")


def charged(policy: Policy[Call]) -> float:
    """What the one tenant was charged."""
    return sum(tenant.clock for tenant in policy._tenants.values())


@pytest.mark.parametrize("why", ["shut", "put back while shut", "too late", "no memory for replies"])
async def test_call_that_is_not_run_costs_its_tenant_nothing(why: str) -> None:
    """Whatever a call is refused for once its turn has come, its tenant is behind nobody for it."""
    ward = Ward()
    remaining = int(why == "too late")
    calls = [ward.sent(A, cost_seconds=1.0, remaining_microseconds=remaining) for _ in range(100)]
    if why == "shut":
        ward.queue.shut(Unavailable("no workers"))
    elif why == "put back while shut":
        ward.queue.feed(Workers(len(calls)))
        ward.queue.pump()
        ward.queue.shut(Unavailable("no workers"))
        for call in calls:
            ward.queue.put_back(call)
    else:
        ward.queue.feed(Workers(len(calls), replies=why == "too late"))
        ward.queue.pump()
    await until(lambda: all(call.ended for call in calls), "all are refused")
    assert charged(ward.policy) == pytest.approx(0.0)
    assert ward.arena.used_bytes == 0


async def test_shut_queue_takes_no_call_to_be_run_again() -> None:
    """A call whose worker was the last, and that was read meanwhile, is refused and does not wait for ever."""
    ward = Ward()
    call = ward.sent(A)
    ward.queue.feed(Workers(1))
    ward.queue.pump()
    ward.queue.shut(Unavailable("no workers"))
    ward.queue.run_again(call)
    assert call.ended
    assert not len(ward.queue)
    assert ward.arena.used_bytes == 0


async def test_calls_that_are_late_together_are_refused_by_turns() -> None:
    """After a standstill the loop goes on between them; who is in time is run all the same."""
    ward = Ward()
    late = [ward.sent(A, remaining_microseconds=1) for _ in range(1_000)]
    in_time = ward.sent(A)
    workers = Workers(1)
    ward.queue.feed(workers)
    ward.queue.pump()
    assert 0 < sum(call.ended for call in late) < len(late)
    await until(lambda: workers.given == [in_time], "whoever is in time is run")
    assert all(call.ended for call in late)
