"""Calls that wait because no replica takes calls: how long, how many, and what becomes of them."""

import asyncio
from typing import Any, cast

import pytest

from tests.support.replicas import HandGateway, hand_gateway
from tests.support.watching import until
from unlatch.common.errors import DeadlineExceeded, NotFound, Unavailable
from unlatch.gateway.fleet.hold import Hold, HoldLimits
from unlatch.gateway.totals import MachineTotals, Totals

LONG = 600.0


def lose(gateway: HandGateway, *, calls: bool = True) -> None:
    """Break the lane to each replica; the calls on it are told first, as by a LaneCaller."""
    for replica in gateway.replicas:
        replica.lane.ended = True
        for sent in replica.lane.calls if calls else []:
            sent.lose()
        replica.lost(cast("Any", replica.lane), "it broke")


async def test_calls_of_a_lost_fleet_go_on_in_their_order() -> None:
    """A call comes while no replica is there. The next replica gets all, and no caller knows of it."""
    async with hand_gateway(replicas=1, hold_seconds=LONG) as gateway:
        lose(gateway)
        begun = [gateway.begin(name=str(number)) for number in range(100)]
        assert (gateway.fleet.held, len(gateway.calls), gateway.live_bytes.held) == (100, 100, 400)
        assert not gateway.fleet.members.take_calls, "another gateway may have a replica"
        gateway.replicas[0].open()
        await until(lambda: len(gateway.sent) == 64, "as many are sent as fit")
        assert [sent.descriptor.request.id for sent in gateway.sent] == [str(number) for number in range(64)]
        answered = 0
        while answered < 100:
            await until(lambda: len(gateway.sent) > answered, "more are sent")  # noqa: B023 (awaited in the loop)
            gateway.sent[answered].answer(b"result")
            answered += 1
        for call, answer in begun:
            call.leave()
            assert (len(answer.replies), answer.errors) == (1, [])
        assert gateway.at_rest()
        assert gateway.errors.places == []


async def test_begun_call_of_a_lost_fleet_is_run_again() -> None:
    """All replicas are lost at once. A pure call waits for the next replica, and one with effects is not repeated."""
    async with hand_gateway(replicas=3, hold_seconds=LONG) as gateway:
        begun = [gateway.begin("pure") for _ in range(30)]
        _, told = gateway.begin("stateful")
        for sent in gateway.sent:
            assert sent.begin is not None
            sent.begin()
        lose(gateway)
        assert [error.status for error in told.errors] == ["ABORTED"]
        assert gateway.fleet.held == 30
        gateway.replicas[2].open()
        await until(lambda: len(gateway.replicas[2].lane.calls) == 30, "all are sent again")
        for sent in gateway.replicas[2].lane.calls:
            sent.answer(b"result")
        assert all(len(answer.replies) == 1 for _, answer in begun)


async def test_gateway_that_starts_holds_calls_of_kernels_that_it_does_not_know() -> None:
    """The first replica that opens a lane says which kernels there are."""
    async with hand_gateway(replicas=0, hold_seconds=LONG) as gateway:
        assert not gateway.fleet.members.take_calls, "no caller is sent here yet"
        (_, known), (_, unknown) = gateway.begin("pure"), gateway.begin("no_such_kernel")
        greeting = asyncio.ensure_future(gateway.fleet.until_known())
        assert gateway.fleet.held == 2
        gateway.fleet.members._found(["127.0.0.1:1"])
        await until(lambda: unknown.errors and gateway.sent, "they go on")
        await greeting
        assert [type(error) for error in unknown.errors] == [NotFound]
        gateway.sent[0].answer(b"result")
        assert (len(known.replies), known.errors) == (1, [])


async def test_held_call_ends_with_its_caller_or_its_deadline() -> None:
    """Nothing of it is left, and no replica gets it."""
    async with hand_gateway(replicas=1, hold_seconds=LONG) as gateway:
        lose(gateway)
        left, answer = gateway.begin()
        _, expired = gateway.begin(seconds=0.01)
        left.leave()
        await until(lambda: expired.errors, "its deadline passes")
        assert [type(error) for error in expired.errors] == [DeadlineExceeded]
        assert (answer.errors, gateway.at_rest()) == ([], True)
        gateway.replicas[0].open()
        assert gateway.sent == []


@pytest.mark.parametrize("started", [True, False])
async def test_calls_are_refused_when_they_have_waited(*, started: bool) -> None:
    """Each call waits for as long. A fleet that has had no replica for longer may be woken by the next call."""
    async with hand_gateway(replicas=int(started), hold_seconds=0.1) as gateway:
        lose(gateway)
        held = [gateway.begin()[1] for _ in range(100)]
        assert gateway.fleet.held == 100
        await until(lambda: all(answer.errors for answer in held), "all are refused")
        await until(lambda: not gateway.fleet.hold.active, "the fleet is held no longer")
        assert {(type(error), str(error)) for answer in held for error in answer.errors} == {
            (Unavailable, "no replica takes calls now")
        }
        assert gateway.at_rest()
        _, answer = gateway.begin()
        assert (gateway.fleet.held, answer.errors) == (1, [])
        await until(lambda: answer.errors, "it is refused")
        assert gateway.errors.places == []


async def test_routed_calls_are_refused_when_the_fleet_is_held_no_longer() -> None:
    """They had a replica, and have lost it. What the fleet served is known all the same, for calls that may wake it."""
    async with hand_gateway(replicas=2, hold_seconds=LONG) as gateway:
        _, answer = gateway.begin("pure")
        lose(gateway)
        assert (gateway.fleet.held, answer.errors) == (1, [])
        gateway.fleet.hold._stop_timer()
        gateway.fleet.hold._expire()
        await until(lambda: answer.errors, "it is refused")
        assert str(answer.errors[0]) == "no replica takes calls now"
        assert [kernel.name for kernel in gateway.fleet.members.catalogue.kernels()] == ["pure", "stateful"]
        assert not gateway.fleet.members.take_calls


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_held_calls": 2}, "no replica takes calls now, and max_held_calls=2 wait for one"),
        ({"max_held_bytes": 10}, "no replica takes calls now, and calls of 8 of max_held_bytes=10 bytes wait for one"),
    ],
)
async def test_held_calls_are_bounded(limits: dict[str, int], says: str) -> None:
    """The next call is refused at once, and the bound is named."""
    async with hand_gateway(replicas=1, hold_seconds=LONG, **limits) as gateway:
        lose(gateway)
        calls = [gateway.begin() for _ in range(3)]
        assert [len(answer.errors) for _, answer in calls] == [0, 0, 1]
        assert str(calls[2][1].errors[0]) == says
        calls[0][0].leave()
        assert gateway.begin()[1].errors == []


async def test_calls_that_siblings_hold_count() -> None:
    """The bounds hold for all units of a machine together, and each unit tells the others what it holds."""
    sibling = Totals(waiting_calls=1, waiting_bytes=6)
    totals = MachineTotals(siblings=[sibling])
    hold = Hold(HoldLimits(LONG, max_calls=2, max_bytes=10), lambda error: error, totals)
    with pytest.raises(Unavailable, match="calls of 6 of max_held_bytes=10 bytes wait"):
        hold.check(5)
    hold.check(4)
    hold.add("call", 4, lambda _: None)
    assert (totals.own.waiting_calls, totals.own.waiting_bytes) == (1, 4)
    with pytest.raises(Unavailable, match="max_held_calls=2 wait"):
        hold.check(0)
    hold.withdraw("call")
    assert (totals.own.waiting_calls, totals.own.waiting_bytes) == (0, 0)
    sibling.clear()
    hold.check(10)
