"""Lost replicas: calls that had begun run again only if they may, others go elsewhere, and none runs twice wrongly."""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.mesh.faults.conftest import Fleet
from tests.support.doors import LARGE, LaneEnd, request
from tests.support.watching import Scrape, until
from unlatch import Client
from unlatch.common.errors import Aborted

pytestmark = pytest.mark.asyncio(loop_scope="session")

StartFleet = Callable[..., Fleet]
RETRIES = "unlatch_retries_total"
BUSY = 12


def left_in(record: Path) -> Counter[float]:
    """Return how often each value is in the record."""
    return Counter(map(float, record.read_text().split())) if record.exists() else Counter()


class Callers:
    """Callers that call again and again, each with values of its own, and check every result."""

    def __init__(self, client: Client, kernel: str, record: Path) -> None:
        self._client = client
        self._kernel = kernel
        self._record = record
        self._next = 0
        self.stopped = False
        self.answered: list[float] = []
        self.failed: list[tuple[float, str]] = []

    async def run(self) -> None:
        """Call until stopped. Only Aborted may end a call."""
        while not self.stopped:
            self._next += 1
            value = float(self._next)
            x = np.array([value, 1.0, -value])
            try:
                y = await self._client.call(self._kernel, x, seconds=0.004, record=str(self._record), timeout=60.0)
            except Aborted as error:
                self.failed.append((value, error.message))
            else:
                np.testing.assert_array_equal(y, x * 2.0)
                self.answered.append(value)


async def test_replicas_are_killed_and_then_restarted_under_load(start_fleet: StartFleet, tmp_path: Path) -> None:
    """No call of a pure kernel fails. Some of others do, each of them is counted, and none has run twice."""
    fleet = start_fleet(3)
    await asyncio.gather(*(asyncio.to_thread(fleet.start, number) for number in range(3)))
    async with Client(fleet.address) as client:
        pure = Callers(client, "doubles", tmp_path / "pure")
        once = Callers(client, "doubles_once", tmp_path / "once")
        running = [asyncio.create_task(who.run()) for who in (pure, once) for _ in range(BUSY)]
        for number in (0, 1, 2):
            seen = len(pure.answered)
            await until(lambda seen=seen: len(pure.answered) > seen + 100, "calls are answered", 30.0)  # type: ignore[misc]
            await asyncio.to_thread(fleet.kill, number)
            await asyncio.to_thread(fleet.start, number)
        before = len(once.failed)
        for number in (0, 1, 2):
            await asyncio.to_thread(fleet.stop, number)
            await asyncio.to_thread(fleet.start, number)
        pure.stopped = once.stopped = True
        await asyncio.gather(*running)
    assert pure.failed == []
    assert len(once.failed) == before, "a drain loses nothing"
    assert all("may have had an effect" in message for _, message in once.failed)
    ran = left_in(tmp_path / "once")
    assert max(ran.values()) == 1
    assert ran.keys() >= set(once.answered)
    now = Scrape(fleet.metrics)
    assert now.sum("unlatch_calls_total", kernel="doubles_once", code="ABORTED") == len(once.failed)
    assert now.sum("unlatch_retries_refused_total", reason="not_pure") == len(once.failed)
    again = now.sum(RETRIES, reason="lost") + now.sum(RETRIES, reason="failed")
    assert again <= 0.1 * (len(pure.answered) + len(once.answered) + len(once.failed)) + 2 * BUSY
    assert sum(left_in(tmp_path / "pure").values()) - len(pure.answered) <= again + now.sum(RETRIES, reason="not_begun")


async def test_call_that_was_begun_is_sent_again_where_it_is_pure(start_fleet: StartFleet, tmp_path: Path) -> None:
    """The replica that runs the call is killed: another runs it, and metrics tell it from calls that had not begun."""
    fleet = start_fleet(2)
    await asyncio.to_thread(fleet.start, 0)
    x, record = np.arange(1.0, 4.0), tmp_path / "record"
    async with Client(fleet.address) as client:
        calling = asyncio.create_task(client.call("stays_at_first", x, record=str(record), timeout=60.0))
        await until(lambda: left_in(record), "it has begun")
        # The beginning is reported with the next message.
        await asyncio.sleep(0.1)
        await asyncio.to_thread(fleet.start, 1)
        await asyncio.to_thread(fleet.kill, 0)
        np.testing.assert_array_equal(await calling, x * 2.0)
    assert left_in(record) == {1.0: 2}
    assert Scrape(fleet.metrics).sum(RETRIES, reason="lost") == 1


@pytest.mark.parametrize("pure", [True, False])
async def test_calls_of_a_frozen_replica_go_elsewhere_or_are_told(
    start_fleet: StartFleet, tmp_path: Path, *, pure: bool
) -> None:
    """The replica's connection stays and its silence is noticed: a pure run is run by another replica, no other is."""
    fleet = start_fleet(2)
    await asyncio.to_thread(fleet.start, 0)
    x, record, kernel = np.arange(1.0, 4.0), tmp_path / "record", "stays_at_first" if pure else "doubles_once"
    async with Client(fleet.address) as client:
        stays = {} if pure else {"seconds": 3600.0}
        calling = asyncio.create_task(client.call(kernel, x, record=str(record), timeout=60.0, **stays))
        await until(lambda: left_in(record), "it has begun")
        await asyncio.to_thread(fleet.start, 1)
        dispatcher = fleet.dispatchers[0]
        assert dispatcher is not None
        dispatcher.signal(signal.SIGSTOP)
        await asyncio.to_thread(
            fleet.gateway.wait_for, "lane to replica broke", replica=f"unix:{fleet.sockets[0]}", within=6.0
        )
        if pure:
            np.testing.assert_array_equal(await calling, x * 2.0)
        else:
            with pytest.raises(Aborted, match="may have had an effect"):
                await calling
        # Calls that come after that do not notice it.
        for value in range(20):
            np.testing.assert_array_equal(await client.doubles(np.array([float(value)])), [2.0 * value])
    assert left_in(record) == {1.0: 2 if pure else 1}


async def test_call_that_nobody_has_begun_is_sent_elsewhere(start_fleet: StartFleet, tmp_path: Path) -> None:
    """A call that waits in a killed replica runs in another, once, pure or not.

    The running call may have had effects.
    """
    fleet = start_fleet(2)
    await asyncio.to_thread(fleet.start, 0)
    record = tmp_path / "record"
    async with Client(fleet.address, timeout=60.0) as client:
        first = asyncio.create_task(client.call("doubles_once", np.array([1.0]), seconds=3600.0, record=str(record)))
        await until(lambda: left_in(record), "it has begun")
        others = [
            asyncio.create_task(client.call("doubles_once", np.array([value]), record=str(record)))
            for value in (2.0, 3.0, 4.0)
        ]
        large = np.full(300_000, 5.0)
        others.append(asyncio.create_task(client.call("doubles_once", large, record=str(record))))
        await until(lambda: Scrape(fleet.metrics).sum("unlatch_calls_in_flight") == 5, "all have come")
        await asyncio.to_thread(fleet.start, 1)
        await asyncio.to_thread(fleet.kill, 0)
        with pytest.raises(Aborted, match="may have had an effect"):
            await first
        for value, y in zip((2.0, 3.0, 4.0, 5.0), await asyncio.gather(*others), strict=True):
            assert set(y) == {2.0 * value}
    assert left_in(record) == {1.0: 1, 2.0: 1, 3.0: 1, 4.0: 1, 5.0: 1}
    assert Scrape(fleet.metrics).sum("unlatch_retries_total", reason="lost") == 0


async def test_large_reply_that_breaks_off_begins_again(start_fleet: StartFleet, tmp_path: Path) -> None:
    """A replica is killed in the middle of a reply of 128 MiB: the caller gets the whole of another reply."""
    fleet = start_fleet(2)
    await asyncio.gather(*(asyncio.to_thread(fleet.start, number) for number in range(2)))
    x, record = np.arange(2.0**17), tmp_path / "record 0"
    with grpc.insecure_channel(fleet.address, options=LARGE) as channel, LaneEnd(channel, within=50.0) as lane:
        for attempt in range(5):
            record, there = tmp_path / f"record {attempt}", tmp_path / f"there {attempt}"
            message = request("repeats_when", {"x": x}, times=128, there=str(there), record=str(record))
            lane.call(attempt, message)
            await until(lambda: left_in(record), "it has begun")  # noqa: B023 (awaited here)
            number = fleet.running(record)
            there.touch()
            await asyncio.to_thread(lane.first_frame, attempt)
            await asyncio.to_thread(fleet.kill, number)
            reply, body = await asyncio.to_thread(lane.reply, attempt)
            assert not reply.HasField("failure"), reply.failure
            assert np.array_equal(np.frombuffer(body), np.tile(x, 128))
            if left_in(record) != {0.0: 1}:
                break
            # This test was not in time: the gateway had the whole of the reply before the kill.
            await asyncio.to_thread(fleet.start, number)
    assert left_in(record) == {0.0: 2}
