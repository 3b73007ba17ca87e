"""Lanes: all that callers have open at a service are greeted, reported to, reopened, closed and drained together."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from unlatch.common.errors import Unauthenticated, Unavailable, UnlatchError
from unlatch.common.fair import Turns
from unlatch.common.lane.frames import ProtocolViolation
from unlatch.common.lane.listener import Caught
from unlatch.common.lane.server import LaneServer
from unlatch.common.net.rpc import abort
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
        await lane.drain()
        self.end_within(0.0)

    def forget(self) -> None:
        """Stop waiting for the lane's calls: the lane has ended."""
        if self.ending is not None:
            self.ending.cancel()


class Lanes:
    """All lanes that callers have open here.

    `welcome` returns what to greet a new lane with. `load`, where this side reports its load, returns it for each of a
    number of lanes that have calls unanswered. `caught` settles exceptions that no code expected
    (common/lane/listener.py).
    """

    def __init__(
        self, welcome: Callable[[], Welcome], caught: Caught, load: Callable[[int], Load] | None = None
    ) -> None:
        self._welcome = welcome
        self._caught = caught
        self._load = load
        self._open: dict[LaneServer, _Opened] = {}
        self._turns = Turns()
        self._draining = self._resting = False

    async def carry(self, lane: LaneServer, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Run the RPC of one lane, for as long as its caller keeps it."""
        lane.welcome(self._welcome())
        if self._load is not None:
            # With the welcome: what the caller has waiting must not come all at once.
            lane.load(self._load(self._busy + 1))
        if self._draining or self._resting:
            lane.draining()
        try:
            async with asyncio.timeout(None) as limit:
                self._open[lane] = _Opened(context, limit)
                try:
                    await lane.run(context.read, context.write, self._turns)
                finally:
                    self._open.pop(lane).forget()
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

    def greet_again(self) -> None:
        """Send the welcome anew on every lane: what is served here has changed, or is served again."""
        self._resting = False
        for lane in self._open:
            lane.welcome(self._welcome())
            if self._draining or lane.refusal is not None:
                lane.draining()

    def report(self) -> None:
        """Tell every caller how much there is to do here."""
        if self._load is not None and self._open:
            load = self._load(max(1, self._busy))
            for lane in self._open:
                lane.load(load)

    def rest(self) -> None:
        """Ask every caller for no more calls until they are greeted again."""
        self._resting = True
        for lane in self._open:
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

    async def drain(self) -> None:
        """Ask every caller for no more calls, and wait until all that came are answered."""
        self._draining = True
        await asyncio.gather(*(lane.drain() for lane in self._open))

    @property
    def _busy(self) -> int:
        return sum(lane.busy for lane in self._open)
