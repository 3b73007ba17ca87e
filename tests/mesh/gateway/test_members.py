"""Membership of the fleet while names gain and lose addresses."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.mesh import running_dispatcher
from tests.support.watching import until
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.members import Members
from unlatch.gateway.fleet.replica import Replica

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Told(Discovery):
    """A resolver that finds what the test tells it."""

    def __init__(self) -> None:
        super().__init__((), 3600.0, 8, name="", bound=True)
        self.tell: Callable[[Sequence[str]], None] = lambda _: None

    async def run(self, tell: Callable[[Sequence[str]], None]) -> NoReturn:
        self.tell = tell
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


async def test_replica_that_is_back_as_its_end_comes_is_opened_anew(tmp_path: Path) -> None:
    """An address goes and comes again, before its last lane has closed and right after the last reference is gone."""
    with running_dispatcher(tmp_path / "dispatcher.sock") as dispatcher:
        target = dispatcher.wait_for("serving")["listen"]
        told = Told()
        errors = InternalErrors(Recorder())
        members = Members(
            told,
            lambda target, events: Replica(target, events, ChannelSecurity(), 10.0, errors),
            changed=lambda: None,
            has_room=lambda: None,
            errors=errors,
        )
        members.start()
        await asyncio.sleep(0)
        try:
            told.tell([target])
            await until(lambda: members.take_calls, "it takes calls")
            told.tell([])
            assert not members.take_calls
            told.tell([target])
            await until(lambda: members.take_calls, "it takes calls again")
            keeping = members._running[target]
            told.tell([])
            # A listener that waits for that would be told after the fleet is.
            while not keeping.done():  # noqa: ASYNC110 (as said)
                await asyncio.sleep(0)
            assert len(members) == 1, "nobody has been told of its end yet"
            told.tell([target])
            await until(lambda: members.take_calls, "it takes calls once more")
            assert members._running[target] is not keeping
        finally:
            await members.close()
