"""Calls that wait are refused in slices: a refusal costs the tenant nothing, and no call is forgotten."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from tests.support.dispatch import Desk
from tests.support.watching import until
from unlatch.common.errors import ResourceExhausted, Unavailable
from unlatch.common.waiting.order import Policy
from unlatch.compute.call import Call
from unlatch.compute.dispatch.outcomes import REQUEUE, RUN_ALONE
from unlatch.compute.pool.occupancy import Held, Occupancy
from unlatch.compute.pool.slot import Slot

A = np.arange(3.0)


class Room:
    """The place of a slot and its runs in flight: once it is open it takes so many calls, and ends none."""

    worker = 0
    expected_end = 0.0

    def __init__(self, room: int, *, replies: bool = True) -> None:
        self.given: list[Call] = []
        self.open = False
        self.occupancy: Occupancy
        self._room = room
        self._replies = replies

    @property
    def in_flight(self) -> "Room":
        return self

    def __len__(self) -> int:
        return len(self.given)

    def has_room(self, _: float) -> bool:
        return self.open and len(self.given) < self._room

    def held(self) -> Held:
        return (0, 0, 0) if self.has_room(0.0) else None, bool(self.given), False, 0.0

    def holds(self, call: Call) -> bool:
        return call in self.given

    def run(self, calls: Sequence[Call], _: float) -> None:
        if not self._replies:
            raise ResourceExhausted("no memory for replies")
        self.given += calls
        self.occupancy.changed(self)


def desk(room: Room) -> Desk:
    """A dispatcher with that room for calls, once it is opened."""
    desk = Desk(slots=[cast("Slot", room)])
    room.occupancy = desk.occupancy
    return desk


def open_up(desk: Desk) -> None:
    """Let calls be given to workers."""
    room = cast("Any", desk.slots[0])
    room.open = True
    desk.occupancy.changed(room)
    desk.dispatcher.assign()


def charged(policy: Policy[Call]) -> float:
    """Seconds that the only tenant was charged."""
    return sum(tenant.clock for tenant in policy._tenants.values())


@pytest.mark.parametrize("why", ["shut", "put back while shut", "too late", "no memory for replies"])
async def test_call_that_is_not_run_costs_its_tenant_nothing(why: str) -> None:
    """Whatever a call is refused for once its turn has come, its tenant is behind nobody for it."""
    remaining = int(why == "too late")
    ward = desk(Room(100, replies=why != "no memory for replies"))
    calls = [ward.sent(A, cost_seconds=1.0, remaining_microseconds=remaining) for _ in range(100)]
    if why == "shut":
        ward.dispatcher.shut(Unavailable("no workers"))
    else:
        open_up(ward)
    if why == "put back while shut":
        ward.dispatcher.shut(Unavailable("no workers"))
        for call in calls:
            ward.dispatcher.settle(call, REQUEUE, refund=True)
    await until(lambda: all(call.ended for call in calls), "all are refused")
    assert charged(ward.backlog) == pytest.approx(0.0)
    assert ward.arena.used_bytes == 0


async def test_shut_dispatcher_takes_no_call_to_be_run_again() -> None:
    """A call whose worker was the last, and that was read meanwhile, is refused and does not wait for ever."""
    ward = desk(Room(1))
    call = ward.sent(A)
    open_up(ward)
    ward.dispatcher.shut(Unavailable("no workers"))
    ward.dispatcher.settle(call, RUN_ALONE)
    assert call.ended
    assert not len(ward.backlog)
    assert ward.arena.used_bytes == 0


async def test_calls_that_are_late_together_are_refused_by_turns() -> None:
    """After a standstill the loop goes on between them; who is in time is run all the same."""
    room = Room(1)
    ward = desk(room)
    # None has a deadline that it could not keep when it came.
    late = [ward.sent(A, cost_seconds=0.0, remaining_microseconds=1) for _ in range(1_000)]
    in_time = ward.sent(A)
    open_up(ward)
    assert 0 < sum(call.ended for call in late) < len(late)
    await until(lambda: room.given == [in_time], "whoever is in time is run")
    assert all(call.ended for call in late)
