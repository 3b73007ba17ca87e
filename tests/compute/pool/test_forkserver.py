"""A real forkserver, asked by hand: its workers and their exit codes, its own end, and requests that are given up."""

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.mesh import KERNELS
from tests.support.watching import children, descriptors, until
from unlatch.compute.errors import StartError
from unlatch.compute.ipc.frames import Ready, decode_for_dispatcher
from unlatch.compute.pool.forkserver import ForkServer, Spawned

WITHIN_SECONDS = 30.0


@asynccontextmanager
async def running() -> AsyncIterator[ForkServer]:
    """Run a forkserver, which has ended afterwards, as have its workers."""
    forkserver = ForkServer([str(KERNELS)], 1, 1 << 20)
    try:
        yield forkserver
    finally:
        await forkserver.close()


async def ready(spawned: Spawned) -> None:
    """Wait until a worker is ready."""
    loop = asyncio.get_running_loop()
    while not isinstance(decode_for_dispatcher(await loop.sock_recv(spawned.channel, 1 << 18)), Ready):
        pass


def has_ended(spawned: Spawned) -> bool:
    """Whether a worker's pidfd says that it has ended."""
    return bool(select.select([spawned.pidfd], [], [], 0)[0])


def forget(spawned: Spawned) -> None:
    spawned.channel.close()
    os.close(spawned.pidfd)


async def test_exit_codes_are_told() -> None:
    """A code is negative for a signal, and 0 for a worker whose channel is closed. Nobody else is reported."""
    async with running() as forkserver:
        killed, closed, living = [await forkserver.spawn_within(WITHIN_SECONDS) for _ in range(3)]
        for spawned in (killed, closed, living):
            await ready(spawned)
            assert spawned.parent == forkserver.pid
        os.kill(killed.pid, signal.SIGKILL)
        closed.channel.shutdown(2)
        assert await asyncio.wait_for(killed.exit_code, WITHIN_SECONDS) == -signal.SIGKILL
        assert await asyncio.wait_for(closed.exit_code, WITHIN_SECONDS) == 0
        assert has_ended(killed)
        assert has_ended(closed)
        assert not has_ended(living)
        assert not living.exit_code.done()
        assert children(forkserver.pid) == [living.pid]
        for spawned in (killed, closed, living):
            forget(spawned)


async def test_forkserver_that_is_killed_is_replaced() -> None:
    """Its workers live on, and their codes are unknown. The next worker is the child of another forkserver."""
    async with running() as forkserver:
        orphan = await forkserver.spawn_within(WITHIN_SECONDS)
        await ready(orphan)
        os.kill(orphan.parent, signal.SIGKILL)
        # It is dead, and the event loop has not noticed yet.
        os.waitid(os.P_PID, orphan.parent, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 (on purpose)
        late = await forkserver.spawn_within(WITHIN_SECONDS)
        await ready(late)
        assert late.parent not in (orphan.parent, os.getpid())
        assert await asyncio.wait_for(orphan.exit_code, WITHIN_SECONDS) is None
        assert not has_ended(orphan)
        for spawned in (orphan, late):
            forget(spawned)


async def test_unfit_forkserver_is_replaced_once() -> None:
    """An unfit forkserver is ended before the next worker is forked, if it is still the one that is meant."""
    async with running() as forkserver:
        first = await forkserver.spawn_within(WITHIN_SECONDS)
        second = await forkserver.spawn_within(WITHIN_SECONDS, unfit=first.parent)
        third = await forkserver.spawn_within(WITHIN_SECONDS, unfit=first.parent)
        assert first.parent != second.parent == third.parent
        for spawned in (first, second, third):
            forget(spawned)


async def test_start_that_takes_too_long_ends_the_forkserver() -> None:
    """The next start has another forkserver, and time of its own."""
    async with running() as forkserver:
        slow = forkserver.pid
        os.kill(slow, signal.SIGSTOP)
        with pytest.raises(StartError, match=r"within worker_start_seconds=0\.2$") as late:
            await forkserver.spawn_within(0.2)
        assert late.value.lasting
        spawned = await forkserver.spawn_within(WITHIN_SECONDS)
        assert spawned.parent != slow
        forget(spawned)


async def test_start_that_is_given_up_leaves_nothing() -> None:
    """A worker that was asked for, and that nobody waits for any more, ends; and no descriptor is left."""
    async with running() as forkserver:
        first = await forkserver.spawn_within(WITHIN_SECONDS)
        await ready(first)
        before = len(descriptors(os.getpid()))
        for rounds in range(4):
            asked = asyncio.ensure_future(forkserver.spawn_within(WITHIN_SECONDS))
            for _ in range(rounds):
                await asyncio.sleep(0)
            asked.cancel()
            await asyncio.wait([asked])
            assert asked.cancelled()
        # Requests are answered in order.
        last = await forkserver.spawn_within(WITHIN_SECONDS)
        await until(lambda: children(forkserver.pid) == [first.pid, last.pid], "the others have ended")
        assert len(descriptors(os.getpid())) == before + 2
        for spawned in (first, last):
            forget(spawned)
