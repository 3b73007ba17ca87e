"""Mistakes at each entry point of the fleet: one call or one replica pays for it, all others go on."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NoReturn, cast

import pytest

from tests.support.watching import until
from unlatch.common.errors import UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.waiting.demand import UNKNOWN, Demand
from unlatch.gateway.fleet import members
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Lane, Replica, ReplicaEvents
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Kernel, LaneMessage, Load, Welcome

WELCOME = Welcome(server="one", version="1", kernels=[Kernel(name="k", version="1")], window_calls=9, window_bytes=99)
FULL = Load(workers=1, least_calls=0, long_calls=0, wait_microseconds=1, short_wait_microseconds=1)
ROOMY = Load(workers=1, least_calls=9, long_calls=9)


class Errors(InternalErrors):
    """Keeps the places where exceptions were caught."""

    def __init__(self) -> None:
        super().__init__(Recorder())
        self.places: list[str] = []

    def caught(self, place: str, error: BaseException) -> Any:
        self.places.append(place)
        return super().caught(place, error)


class Found(Discovery):
    """Finds what the test has it find."""

    def __init__(self) -> None:
        super().__init__((), 3600.0, 8, name="", bound=True)
        self.tell: Callable[[Sequence[str]], None] = lambda _: None
        self.runs = 0

    async def run(self, tell: Callable[[Sequence[str]], None]) -> NoReturn:
        self.tell = tell
        self.runs += 1
        if self.runs == 1 and self.fails_first:
            raise ValueError("a mistake")
        await asyncio.Event().wait()
        raise AssertionError("it never ends")

    fails_first = False


class OpenLane:
    """A lane that carries calls nowhere."""

    finishing = ended = False
    welcomed = True

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call(self, _: Descriptor, __: Body, listener: Any, ___: Any = None) -> int:
        if listener.breaks == "lane":
            raise ValueError("a mistake")
        self.calls.append(listener)
        return len(self.calls)

    def cancel(self, number: int) -> None: ...

    def finish(self) -> None: ...


class Quiet(Replica):
    """A replica whose task opens no lane, and fails when it is told to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fails = asyncio.Event()

    async def run(self) -> None:
        await self.fails.wait()
        raise ValueError("a mistake")


@dataclass(eq=False)
class Call:
    """A call that makes a mistake somewhere, or none."""

    breaks: str = ""
    error: UnlatchError | None = None
    replica: Replica | None = None
    demand: Demand = field(default_factory=lambda: Demand("k", 1, "tenant", 1, monotonic() + 60.0))
    estimate: Any = UNKNOWN
    descriptor: Descriptor = field(default_factory=Descriptor)
    body: Body = field(default_factory=lambda: Body((1,), [b"x"]))
    avoids: Replica | None = None

    def __post_init__(self) -> None:
        self.descriptor.request.kernel = "k"

    def remaining_microseconds(self) -> int:
        if self.breaks == "send":
            raise ValueError("a mistake")
        return 1

    def started(self) -> bool:
        raise AssertionError("no worker begins it")

    def sent(self, replica: Replica, _: Lane, __: int) -> None:
        if self.breaks == "sent":
            raise ValueError("a mistake")
        self.replica = replica

    def unroutable(self, error: UnlatchError) -> None:
        self.error = error
        if self.breaks == "refusal":
            raise ValueError("a mistake")


class World:
    """A fleet of one replica that the test plays."""

    def __init__(self, *, fails_first: bool = False) -> None:
        self.errors = Errors()
        self.discovery = Found()
        self.discovery.fails_first = fails_first
        self.breaks_change = False
        self.made: list[Quiet] = []
        self.fleet = Fleet(self.discovery, {}, self._changed, self._new_replica, self.errors)
        self.lane = OpenLane()

    def _changed(self) -> None:
        if self.breaks_change:
            raise ValueError("a mistake")

    def _new_replica(self, target: str, events: ReplicaEvents) -> Replica:
        if target == "wrong":
            raise ValueError("a mistake")
        self.made.append(Quiet(target, events, ChannelSecurity(), 0.0, self.errors))
        return self.made[-1]

    @property
    def replica(self) -> Quiet:
        return self.made[-1]

    def opened(self, load: Load) -> None:
        """Have the replica take calls."""
        self.replica.welcomed(self.lane, WELCOME)
        self.replica.reported(self.lane, load)

    def route(self, breaks: str = "") -> Call:
        call = Call(breaks)
        self.fleet.route(cast("Any", call))
        return call


@asynccontextmanager
async def world(load: Load = ROOMY, **how: bool) -> AsyncIterator[World]:
    made = World(**how)
    made.fleet.members.start()
    await until(lambda: made.discovery.runs > 0, "discovery has begun")
    made.discovery.tell(["one"])
    made.opened(load)
    try:
        yield made
    finally:
        await made.fleet.members.close()


@pytest.mark.parametrize("breaks", ["send", "lane", "sent"])
async def test_new_call_that_cannot_be_sent_by_a_mistake_fails(breaks: str) -> None:
    """With the id of the error's log entry; the next call is sent."""
    async with world() as made:
        call = made.route(breaks)
        assert call.error is not None
        assert (call.error.status, made.errors.places) == ("INTERNAL", ["route"])
        assert made.route().replica is made.replica


@pytest.mark.parametrize(
    ("breaks", "place"),
    [("send", "send_held"), ("lane", "send_held"), ("sent", "send_held"), ("place", "held_call")],
)
async def test_held_call_whose_routing_fails_by_a_mistake_fails(breaks: str, place: str) -> None:
    """Only that call fails: the calls before and behind it are sent as soon as there is room."""
    async with world(FULL) as made:
        before, wrong, behind = made.route(), made.route(breaks), made.route()
        assert made.fleet.held == 3
        if breaks == "place":
            wrong.estimate = None
        made.replica.reported(made.lane, ROOMY)
        await until(lambda: not made.fleet.held, "none is held")
        assert wrong.error is not None
        assert wrong.error.status == "INTERNAL"
        assert made.errors.places == [place]
        assert [call.replica for call in (before, behind)] == [made.replica] * 2


async def test_call_that_takes_no_refusal_does_not_keep_others_from_theirs() -> None:
    """Of calls that no replica serves any more each is refused, whatever the others do with it."""
    async with world(FULL) as made:
        calls = [made.route("refusal" if number % 25 == 1 else "") for number in range(100)]
        made.discovery.tell([])
        await until(lambda: not made.fleet.held, "none is held")
        assert {call.error.status for call in calls if call.error} == {"UNAVAILABLE"}
        assert all(call.error for call in calls)
        assert made.errors.places == ["refuse_held"] * 4


async def test_mistake_of_who_is_told_of_changes_keeps_no_call() -> None:
    """Held calls are sent or refused all the same."""
    async with world(FULL) as made:
        call = made.route()
        made.breaks_change = True
        made.replica.reported(made.lane, ROOMY)
        assert call.replica is made.replica
        made.discovery.tell([])
        assert not made.fleet.members.take_calls
        assert "fleet_changed" in made.errors.places


async def test_discovery_that_ends_by_a_mistake_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the fleet would stay as it is for ever."""
    monkeypatch.setattr(members, "_ANEW_SECONDS", 0.01)
    made = World(fails_first=True)
    made.fleet.members.start()
    await until(lambda: made.discovery.runs == 2, "discovery has begun again")
    assert made.errors.places == ["discovery"]
    await made.fleet.members.close()


async def test_replica_that_cannot_join_by_a_mistake_keeps_no_other_out() -> None:
    """The addresses behind it join, and those that are gone leave."""
    async with world() as made:
        made.discovery.tell(["wrong", "two"])
        assert made.errors.places == ["replica_joins"]
        assert [replica.target for replica in made.made] == ["one", "two"]
        assert not made.made[0].takes_calls


async def test_replica_whose_task_fails_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same address, though those who are told of it make a mistake too."""
    monkeypatch.setattr(members, "_ANEW_SECONDS", 0.01)
    async with world() as made:
        made.breaks_change = True
        made.replica.fails.set()
        await until(lambda: len(made.made) == 2, "it is opened anew")
        assert made.errors.places == ["replica", "fleet_changed"]
        made.breaks_change = False
        made.opened(ROOMY)
        assert made.route().replica is made.replica


@pytest.mark.parametrize("said", [Frames(welcome=Welcome()), Frames(draining=True), Frames(load=ROOMY)])
async def test_mistake_in_what_a_lane_says_does_not_end_the_lane(said: Frames) -> None:
    """Nor the replica's task: what the lane says next is taken in."""
    async with world() as made:

        def mistake(*_: Any) -> None:
            raise ValueError("a mistake")

        lane = made.replica._new_lane()
        made.replica.welcomed(lane, WELCOME)
        events, made.replica._events = made.replica._events, ReplicaEvents(mistake, mistake, mistake)
        lane._receive(LaneMessage(frames=said).SerializeToString())
        assert made.errors.places == ["lane_frame"]
        made.replica._events = events
        lane._receive(LaneMessage(frames=Frames(welcome=WELCOME, load=ROOMY)).SerializeToString())
        assert (made.errors.places, made.replica.takes_calls) == (["lane_frame"], True)


async def test_mistake_at_the_end_of_a_lane_leaves_the_replica_without_it() -> None:
    """The replica takes no calls until it has another lane."""
    async with world() as made:

        def mistake(*_: Any) -> None:
            raise ValueError("a mistake")

        made.replica._events = ReplicaEvents(mistake, mistake, mistake)
        made.replica.lost(cast("Any", made.lane), "it broke")
        assert made.errors.places == ["replica_lost"]
        assert not made.replica.takes_calls
        assert made.route().error is not None
