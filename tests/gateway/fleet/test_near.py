"""A fleet with a near replica, as a unit has one: calls go there unless another one would be done sooner."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from tests.gateway.fleet.conftest import Clock
from tests.support.replicas import HandGateway, HandReplica, hand_gateway
from tests.support.watching import until
from unlatch.protos.unlatch_pb2 import Load

pytestmark = pytest.mark.usefixtures("clock")

LONG = 600.0
# A run of unknown time is overdue.
OVERDUE = 0.1


@asynccontextmanager
async def near_and_far(far: int) -> AsyncIterator[tuple[HandGateway, HandReplica, list[HandReplica]]]:
    """A gateway with one near replica, and others that are further away."""
    async with hand_gateway(replicas=1 + far, hold_seconds=LONG) as gateway:
        near, *others = gateway.replicas
        for replica in others:
            replica.way_seconds = 0.002
        for replica in gateway.replicas:
            replica.open()
        yield gateway, near, others


def report(replica: HandReplica, *, wait_seconds: float = 0.0, calls: int = 64) -> None:
    """Have a replica report what it has to do, and how many calls it takes."""
    wait = round(wait_seconds * 1e6)
    replica.reported(
        cast("Any", replica.lane),
        Load(workers=1, wait_microseconds=wait, short_wait_microseconds=wait, least_calls=calls, long_calls=calls),
    )


async def test_near_replica_is_preferred() -> None:
    """Of a near replica and six others, all idle, the near one gets each call."""
    async with near_and_far(6) as (gateway, near, others):
        for _ in range(50):
            call, _ = gateway.begin()
            near.lane.calls[-1].answer(b"result", run_seconds=1e-4)
            call.leave()
        assert len(near.lane.calls) == 50
        assert not any(replica.lane.calls for replica in others)


async def test_busy_near_replica_leaves_calls_to_others() -> None:
    """The near replica says that a call would wait for a second: each of six others is sooner."""
    async with near_and_far(6) as (gateway, near, others):
        report(near, wait_seconds=1.0)
        for _ in range(6):
            gateway.begin()
        assert not near.lane.calls
        assert sum(len(replica.lane.calls) for replica in others) == 6


async def test_call_waits_for_the_near_replica_if_that_is_sooner() -> None:
    """The near replica has no room, and the other one has some, but would be done later."""
    async with near_and_far(1) as (gateway, near, (far,)):
        report(near, calls=1)
        report(far, wait_seconds=1.0)
        gateway.begin()
        gateway.begin()
        assert (len(near.lane.calls), len(far.lane.calls), gateway.fleet.held) == (1, 0, 1)
        near.lane.calls[0].answer(b"result", run_seconds=1e-4)
        await until(lambda: len(near.lane.calls) == 2, "it is sent to the near one")


async def test_call_waits_for_no_near_replica_that_is_gone() -> None:
    """The near replica has no room, and then drains: the call that waits for it goes to the other one."""
    async with near_and_far(1) as (gateway, near, (far,)):
        report(near, calls=1)
        report(far, wait_seconds=1.0)
        gateway.begin()
        gateway.begin()
        assert gateway.fleet.held == 1
        near.drains(cast("Any", near.lane))
        await until(lambda: len(far.lane.calls) == 1, "it is sent to the other one")


async def test_call_waits_for_no_near_replica_that_answers_nothing(clock: Clock) -> None:
    """The near replica has no room, says that none of its runs takes long, and answers none: the other one gets it."""
    async with near_and_far(1) as (gateway, near, (far,)):
        report(near, calls=1)
        gateway.begin()
        report(far, wait_seconds=0.05)
        gateway.begin()
        assert (len(near.lane.calls), len(far.lane.calls), gateway.fleet.held) == (1, 0, 1)
        while not far.lane.calls:
            clock.now += 0.01
            report(near, calls=1)
            await asyncio.sleep(0)


async def test_call_waits_behind_no_run_that_takes_longer_than_expected(clock: Clock) -> None:
    """The near replica has room and says that no call would wait, but has not answered one: the other one gets it."""
    async with near_and_far(1) as (gateway, near, (far,)):
        report(near)
        report(far)
        gateway.begin()
        assert len(near.lane.calls) == 1
        clock.now += OVERDUE
        report(near)
        gateway.begin()
        assert (len(near.lane.calls), len(far.lane.calls)) == (1, 1)
