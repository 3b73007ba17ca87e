"""Which silence makes a replica count as lost: by hand-made circumstances, and in a fleet of silent replicas."""

import asyncio
from typing import Any, cast

import pytest

from tests.support.replicas import HandGateway, HandReplica, hand_gateway
from tests.support.watching import until
from unlatch.common.machine.core_pressure import CorePressure
from unlatch.gateway.fleet import members
from unlatch.gateway.fleet.ejection import LANE
from unlatch.gateway.fleet.replica import Replica
from unlatch.gateway.fleet.silence import Circumstances, Silence, must_stay

WELL = Circumstances(others=2)
LATE = Circumstances(late_seconds=0.2, others=2)
PRESSED = Circumstances(pressure=0.3, others=2)
TOGETHER = Circumstances(others=3, others_silent=2)
STOPPED = Circumstances(late_seconds=9.0, pressure=1.0, others=1, others_silent=1, stopped=True)


def missed(*looks: Circumstances) -> Silence:
    silence = Silence()
    for look in looks:
        silence.missed(look)
    return silence


@pytest.mark.parametrize(
    ("look", "reports"),
    [(WELL, 5), (Circumstances(others=3, others_silent=1), 5), (STOPPED, 5), (LATE, 50), (PRESSED, 50), (TOGETHER, 50)],
    ids=["well", "few of the others", "stopped", "the loop is late", "cores are short", "silent together"],
)
def test_reports_until_a_replica_is_lost(look: Circumstances, reports: int) -> None:
    """A silence that something else may explain counts a tenth. A process that is stopped is beyond doubt."""
    assert not missed(*[look] * (reports - 1)).too_long
    assert missed(*[look] * reports).too_long


def test_one_message_ends_the_silence() -> None:
    """Nothing that was missed before counts."""
    silence = missed(*[WELL] * 4)
    assert silence.silent
    silence.heard()
    assert not silence.silent
    silence.missed(WELL)
    assert (silence.silent, silence.too_long) == (False, False)


@pytest.mark.parametrize(
    ("known", "in_use", "heard", "stopped", "stays"),
    [
        (1, 0, 0, False, "no other replica is heard"),
        (1, 0, 0, True, "no other replica is heard"),
        (3, 2, 0, False, "no other replica is heard"),
        (2, 1, 1, False, ""),
        (3, 2, 2, False, ""),
        (3, 2, 1, False, ""),
        (3, 1, 1, False, "fewer than half of the known replicas would be in use"),
        (3, 1, 1, True, ""),
        (4, 2, 2, False, ""),
        (4, 1, 1, False, "fewer than half of the known replicas would be in use"),
    ],
)
def test_silent_replica_is_kept_where_it_is_needed(
    *, known: int, in_use: int, heard: int, stopped: bool, stays: str
) -> None:
    """The last one that may live is kept, and so is half of the fleet, except for a process that is stopped."""
    assert must_stay(known=known, in_use=in_use, heard=heard, stopped=stopped) == stays


@pytest.fixture
def pressure(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sets the pressure that fleets read: the last of the list."""
    shares = [0.0]
    monkeypatch.setattr(CorePressure, "share", lambda _, *, whole_machine: shares[-1] * whole_machine)
    return shares


def miss(gateway: HandGateway, *silent: HandReplica, reports: int = 5) -> list[bool]:
    """Have replicas miss reports, by turns. Returns which of them are lost then."""
    for _ in range(reports - 1):
        for replica in silent:
            assert not gateway.fleet.members.missed(replica, 0.0)
    return [gateway.fleet.members.missed(replica, 0.0) for replica in silent]


async def test_only_replica_is_never_lost_by_silence(pressure: list[float]) -> None:
    """However long it is silent; and neither is the last one that takes calls."""
    async with hand_gateway(replicas=2) as gateway:
        first, second = gateway.replicas
        first.takes_calls = False
        assert not any(any(miss(gateway, second, reports=1)) for _ in range(500))
        assert second.silence.kept
        first.takes_calls = True
        assert miss(gateway, second, reports=1) == [True]


async def test_replicas_that_are_silent_together_are_kept(pressure: list[float]) -> None:
    """All of them: the fault is here. Of two of three only one may go, and later."""
    async with hand_gateway(replicas=3) as gateway:
        assert miss(gateway, *gateway.replicas, reports=60) == [False] * 3
        gateway.replicas[0].silence.heard()
        assert [gateway.fleet.members.missed(replica, 0.0) for replica in gateway.replicas[1:]] == [True, True]
        gateway.replicas[1].takes_calls = False
        assert not gateway.fleet.members.missed(gateway.replicas[2], 0.0)


async def test_busy_machine_makes_the_fleet_patient(pressure: list[float]) -> None:
    """A replica that does not say where it runs may run here."""
    async with hand_gateway(replicas=3) as gateway:
        pressure.append(1.0)
        assert miss(gateway, gateway.replicas[0], reports=50) == [True]
        gateway.replicas[0].silence.heard()
        pressure.append(0.0)
        assert miss(gateway, gateway.replicas[0], reports=5) == [True]


async def test_half_of_the_known_replicas_are_not_ejected() -> None:
    """Of three replicas one is away. Then none of the others is ejected, whatever it answers."""
    async with hand_gateway(replicas=3) as gateway:
        away, ill, well = gateway.replicas
        for _ in range(5):
            gateway.fleet.members.failed(ill, LANE)
        assert (ill.ejection.ejected, well.ejection.ejected) == (True, False)
        ill.ejection.pardon()
        away.takes_calls = False
        for _ in range(20):
            gateway.fleet.members.failed(ill, LANE)
        assert not ill.ejection.ejected


async def test_silent_replica_is_given_calls_last() -> None:
    """The report that its expectation rests on is older by its silence."""
    async with hand_gateway(replicas=2) as gateway:
        gateway.replicas[0].window.silent_seconds = 0.5
        for _ in range(20):
            gateway.begin()
        assert [len(replica.lane.calls) for replica in gateway.replicas] == [0, 20]


class SilentLane:
    """A lane whose messages the test counts."""

    welcomed = True
    heard = 1


@pytest.mark.parametrize("others", [0, 1])
async def test_lane_is_given_up_by_looks_at_it(
    monkeypatch: pytest.MonkeyPatch, pressure: list[float], *, others: int
) -> None:
    """Looks of a replica at its own lane: without another replica they go on, and a message ends the silence."""
    async with hand_gateway(replicas=1 + others) as gateway:
        replica = gateway.replicas[0]
        lane: Any = SilentLane()
        replica._lane = lane
        replica.window.interval_seconds = 0.01
        # This machine may be busy.
        monkeypatch.setattr(members, "Circumstances", lambda _, __, *rest: Circumstances(0.0, 0.0, *rest))
        looking = asyncio.ensure_future(Replica._until_silent(replica, cast("Any", lane)))
        if others:
            assert (await looking).startswith("nothing was heard of it for ")
            return
        await until(lambda: replica.silence.kept, "it is kept")
        assert replica.window.silent_seconds > 0.0
        lane.heard += 1
        await until(lambda: not replica.silence.kept, "it is heard")
        assert not looking.done()
        looking.cancel()
