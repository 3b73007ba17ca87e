"""Lanes: all that callers have open at a service are greeted, reported to, reopened, closed and drained together."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog

from unlatch.common.errors import Unauthenticated, Unavailable, UnlatchError
from unlatch.common.fair import Turns
from unlatch.common.lane.frames import ProtocolViolation
from unlatch.common.lane.listener import Caught
from unlatch.common.lane.server import LaneServer, ServingEnd
from unlatch.common.net.rpc import abort
from unlatch.common.overdue import Overdue
from unlatch.protos.unlatch_pb2 import Load, Welcome

log = structlog.get_logger()


@dataclass(slots=True)
class _Opened:
    """An open lane's RPC, and how much longer it may last."""

    context: Any
    limit: asyncio.Timeout
    ending: asyncio.Task[None] | None = None

    def end_within(self, seconds: float) -> None:
        """Cut the lane off after `seconds`, or earlier where that was set before."""
        end, until = asyncio.get_running_loop().time() + seconds, self.limit.when()
        if not self.limit.expired():
            self.limit.reschedule(end if until is None else min(end, until))

    async def end_after(self, lane: LaneServer) -> None:
        """Cut the lane off as soon as the calls that came on it are answered."""
        await lane.end()
        self.end_within(0.0)

    def forget(self) -> None:
        """Stop waiting for the lane's calls: the lane has ended."""
        if self.ending is not None:
            self.ending.cancel()


class Lanes:
    """All lanes that callers have open here.

    `welcome` returns what to greet a tenant's new lane with. `load`, where this side reports its load, returns it for
    each of a number of lanes that have calls unanswered. `caught` settles exceptions that no code expected
    (common/lane/listener.py). `unread` disconnects callers that do not read what is written to them
    (common/net/unread.py).
    """

    def __init__(
        self,
        welcome: Callable[[str], Welcome],
        caught: Caught,
        unread: Overdue[Any],
        load: Callable[[int], Load] | None = None,
    ) -> None:
        self._welcome = welcome
        self._caught = caught
        self._unread = unread
        self._load = load
        # All lanes with their tenants, and those among them that are RPCs.
        self._greeted: dict[ServingEnd, str] = {}
        self._open: dict[LaneServer, _Opened] = {}
        self._turns = Turns()
        self._draining = self._resting = False
        # The error that every new call is refused with once the service ends.
        self._refusal: UnlatchError | None = None

    async def carry(self, lane: LaneServer, context: grpc.aio.ServicerContext[bytes, bytes], tenant: str = "") -> None:
        """Run the RPC of one lane, for as long as its caller keeps it."""

        async def write(message: bytes) -> None:
            self._unread.begin(context)
            try:
                await context.write(message)
            finally:
                self._unread.end(context)

        try:
            async with asyncio.timeout(None) as limit:
                opened = _Opened(context, limit)
                try:
                    # By turns with what open lanes bring: thousands may be opened at once.
                    await self._turns.take(partial(self._take, lane, tenant, opened))
                    await lane.run(context.read, write, self._turns)
                finally:
                    self._open.pop(lane, None)
                    self.forget(lane)
                    opened.forget()
                    lane.close()
        except TimeoutError:
            why = lane.refusal or Unavailable("this lane was opened with certificates that have been replaced since")
            await abort(context, why)
        except ProtocolViolation as violation:
            log.warning("lane closed", peer=context.peer(), message=str(violation))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        except grpc.aio.BaseError:
            # The connection broke, or the RPC has been aborted.
            raise
        except Exception as error:  # noqa: BLE001 (the guard: the caller hears of it)
            await abort(context, self._caught("lane", error))

    def _take(self, lane: LaneServer, tenant: str, opened: _Opened) -> None:
        # At once, so that the lane hears of an end that begins in this round of the loop.
        self._open[lane] = opened
        self.greet(lane, tenant)
        if self._refusal is not None:
            # A caller may send what it has waiting as soon as it is greeted, and the service may end before that comes.
            lane.refuse(self._refusal)
            lane.last()

    def greet(self, lane: ServingEnd, tenant: str = "") -> None:
        """Greet a tenant's new lane, and tell it from now on what all lanes are told."""
        if self._load is not None:
            # Before the welcome: what the caller has waiting must not come all at once.
            lane.load(self._load(self._busy + 1))
        self._greeted[lane] = tenant
        self._greet(lane, tenant)
        if self._resting:
            lane.draining()

    def forget(self, lane: ServingEnd) -> None:
        """Tell a lane nothing more: it has ended."""
        self._greeted.pop(lane, None)

    def greet_again(self) -> None:
        """Send the welcome anew on every lane: what is served here has changed, or is served again."""
        self._resting = False
        for lane, tenant in self._greeted.items():
            self._greet(lane, tenant)

    def report(self) -> None:
        """Tell every caller how much there is to do here."""
        if self._load is not None and self._greeted:
            load = self._load(max(1, self._busy))
            for lane in self._greeted:
                lane.load(load)

    def rest(self) -> None:
        """Ask every caller for no more calls until they are greeted again."""
        self._resting = True
        for lane in self._greeted:
            lane.draining()

    def reopen(self, within_seconds: float) -> None:
        """Ask every caller for another lane in its lane's place, and cut the old ones off `within_seconds`."""
        for lane, opened in self._open.items():
            lane.reopen()
            opened.end_within(within_seconds)

    def check(self, refusal: Callable[[Any], str], within_seconds: float) -> None:
        """Take no more calls of callers for whom `refusal` returns a reason; answer what they sent before."""
        for lane, opened in self._open.items():
            if lane.refusal is None and (why := refusal(opened.context)):
                log.warning("lane is closed", peer=opened.context.peer(), message=why)
                lane.reopen()
                self.close(lane, Unauthenticated(why), within_seconds)

    def close(self, lane: LaneServer, why: UnlatchError, within_seconds: float) -> None:
        """Take no more calls on a lane. It ends when those that came are answered, at the latest `within_seconds`."""
        opened = self._open.get(lane)
        if opened is not None and opened.ending is None:
            lane.refuse(why)
            opened.end_within(within_seconds)
            opened.ending = asyncio.create_task(opened.end_after(lane))

    def leave(self) -> None:
        """Ask every caller for no more calls, now and whenever a lane is opened or greeted."""
        self._draining = True
        for lane in self._greeted:
            lane.draining()

    def leave_remote(self) -> None:
        """Ask the callers of other processes for no more calls."""
        for lane in self._open:
            lane.draining()

    async def drain(self) -> None:
        """Ask every caller for no more calls, and wait until all that came are answered."""
        self._draining = True
        await asyncio.gather(*(lane.drain() for lane in self._greeted))

    async def end(self, refusal: UnlatchError) -> None:
        """Refuse new calls, and wait until all that came are answered, and callers know that no others were begun."""
        self._draining = True
        self._refusal = refusal
        for lane in self._greeted:
            lane.refuse(refusal)
        await asyncio.gather(*(lane.end() for lane in self._greeted))

    def _greet(self, lane: ServingEnd, tenant: str) -> None:
        lane.welcome(self._welcome(tenant))
        if self._draining:
            lane.draining()

    @property
    def _busy(self) -> int:
        return sum(lane.busy for lane in self._greeted)
