"""A lane within one process: both ends of it, joined by method calls.

    Replica of a gateway                                            Call of a dispatcher
    call, cancel ──────── at once; large bodies by turns ─────────> accept, feed, abandon
    listener <─── collected, in the next round of the event loop ── reply, started, welcome, load

Nothing that the serving end says reaches the calling end within a method that the calling end has called. So neither
end meets the other in the middle of a change. A large reply is read where the worker has written it: its listeners copy
the bytes, and the segment is given back when the last of them has let go of the body.

Each step has a guard of its own, as on a lane of a stream: an unexpected exception ends one call at most.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from time import monotonic

from unlatch.common.errors import Unavailable, UnlatchError
from unlatch.common.fair import ByTurns, by_turns
from unlatch.common.lane.body import Body, Cursor
from unlatch.common.lane.listener import CallGuard, Caught, ReplyListener
from unlatch.common.lane.outbox import PIECE_BYTES
from unlatch.common.lane.replies import failed, raised
from unlatch.common.lane.server import Accepted
from unlatch.protos.unlatch_pb2 import Descriptor, Load, Reply, Welcome

# A body up to this size is copied into the arena within `call`: 0.1 to 0.3 ms. A larger one takes turns.
_AT_ONCE_BYTES = 1024 * 1024
# Time limit of one round of deliveries. A delivery may copy a whole response.
_ROUND_SECONDS = 0.002
# Calls that are lost in one round. Each may send another call at once, which takes some 50 µs.
_LOST_AT_ONCE = 32

Accept = Callable[["LocalLane", Descriptor, list[memoryview] | None], Accepted | None]


class _Carried:
    """A call on the lane: its listener, and the serving end's part of it until it is answered."""

    __slots__ = ("accepted", "cursor", "listener", "number", "started")

    def __init__(self, number: int, listener: ReplyListener, started: Callable[[], bool] | None) -> None:
        self.number = number
        self.listener = listener
        self.started = started
        self.accepted: Accepted | None = None
        # The place in a body that is still being fed to the serving end.
        self.cursor: Cursor | None = None

    def feed(self) -> bool:
        """Feed one piece of the body; return whether there may be more."""
        if self.cursor is None or self.accepted is None:
            return False
        piece = self.cursor.next(PIECE_BYTES)
        if piece is not None:
            self.accepted.feed(memoryview(piece))
        return piece is not None

    def release(self) -> Accepted | None:
        """Feed no more of the body, and return the serving end's part: none where the call is answered."""
        if self.cursor is not None:
            self.cursor.close()
            self.cursor = None
        accepted, self.accepted = self.accepted, None
        return accepted


class LocalLane:
    """Both ends of one lane, from its opening to its end. Not used again afterwards.

    `accept` is called for each descriptor, as by a LaneServer. The next three are called with what the serving end says
    of itself. `caught` handles unexpected exceptions (common/lane/listener.py).
    """

    def __init__(
        self,
        accept: Accept,
        on_welcome: Callable[[Welcome], None],
        on_draining: Callable[[], None],
        on_load: Callable[[Load], None],
        caught: Caught,
    ) -> None:
        self._accept = accept
        self._on_welcome = on_welcome
        self._on_draining = on_draining
        self._on_load = on_load
        self._guard = CallGuard(caught, self._break_off)
        self.welcomed = self.finishing = self.ended = False
        # The error that new calls are refused with.
        self._refusal: UnlatchError | None = None
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._calls: dict[int, _Carried] = {}
        # What the serving end has said, and the calling end has not heard yet.
        self._said: deque[Callable[[], None]] = deque()
        self._hears_soon = False
        # Calls with bytes to feed, one piece of each by turns.
        self._feeding: deque[_Carried] = deque()
        self._feeds = ByTurns(self._feed_all, at_once=1, caught=partial(caught, "lane_piece"))
        self._over = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def run(self) -> None:
        """Carry calls until `close`, or until the lane is finished; then abandon the calls and tell their listeners."""
        try:
            await self._over.wait()
        finally:
            while self._said:
                self._said.popleft()()
            self.ended = True
            await by_turns(self._lose_all(), _LOST_AT_ONCE)

    def close(self) -> None:
        """End the lane now, because its serving end ends."""
        self._over.set()

    # What the calling end calls.

    def call(
        self, descriptor: Descriptor, body: Body, listener: ReplyListener, started: Callable[[], bool] | None = None
    ) -> int:
        """Send a call and return its number. The listener hears exactly one end, unless the call is cancelled.

        The descriptor is copied, because its owner may send it again while the serving end still has this one.
        """
        number = next(self._numbers)
        own = Descriptor()
        own.CopyFrom(descriptor)
        own.call = number
        own.lengths[:] = body.lengths
        carried = self._calls[number] = _Carried(number, listener, started)
        self._quiet.clear()
        if self._refusal is not None:
            self.fail(number, self._refusal)
            return number
        at_once = body.size <= _AT_ONCE_BYTES and body.complete and len(body.buffers) == len(body.lengths)
        try:
            whole = [memoryview(buffer) for buffer in body.buffers] if at_once else None
            carried.accepted = self._accept(self, own, whole)
        except Exception as error:  # noqa: BLE001 (a guard in line: on every call's path)
            self._break_off(number, self._guard.caught("lane_call", error))
            return number
        if whole is None and carried.accepted is not None:
            carried.cursor = body.subscribe(partial(self._more, carried))
            self._more(carried)
        return number

    def cancel(self, number: int) -> None:
        """Give a call up, and ignore what the serving end still says about it."""
        if (carried := self._forget(number)) is not None:
            self._abandon(carried)

    def finish(self) -> None:
        """End the lane as soon as its calls are answered. No more calls go on it."""
        self.finishing = True
        self._end_if_finished()

    # What the serving end calls.

    @property
    def busy(self) -> bool:
        """Whether calls are unanswered."""
        return bool(self._calls)

    def welcome(self, welcome: Welcome) -> None:
        """Say what is served here, and the window that is granted."""
        self._say(partial(self._tell, self._welcome, welcome))

    def load(self, load: Load) -> None:
        """Make a load report."""
        self._say(partial(self._tell, self._on_load, load))

    def draining(self) -> None:
        """Ask the calling end to send new calls elsewhere."""
        self._say(partial(self._tell, self._on_draining))

    async def drain(self) -> None:
        """Ask the calling end to send no more calls, and wait until all calls are answered."""
        self.draining()
        await self._quiet.wait()

    def refuse(self, error: UnlatchError) -> None:
        """Answer every new call with this error from now on, and that it was not begun."""
        error.not_begun = True
        self._refusal = error

    async def end(self) -> None:
        """Drain a lane that refuses calls. No call is under way that the serving end has not taken."""
        await self.drain()

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        """Tell the calling end that a call has begun; with `heard`, that it is about to.

        `heard` is called when the calling end has confirmed that it knows.
        """
        self._say(partial(self._guard, "lane_started", number, self._begun, number, heard))

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Answer a call. `sent` is called when the body's buffers are no longer needed."""
        reply.lengths[:] = body.lengths
        reply.whole = True
        if sent is not None:
            body.when_freed = partial(self._guard, "lane_sent", None, sent)
        if (carried := self._calls.get(number)) is not None:
            # A cancel does not reach the call any more, nor do the rest of its bytes.
            carried.release()
        self._say(partial(self._replied, number, reply, body))

    def fail(self, number: int, error: UnlatchError) -> None:
        """Answer a call with an error."""
        self.reply(number, failed(error), Body((), ()))

    # What the calling end hears in the next round of the event loop.

    def _say(self, step: Callable[[], None]) -> None:
        self._said.append(step)
        if not self._hears_soon:
            self._hears_soon = True
            self._loop.call_soon(self._hear)

    def _hear(self) -> None:
        self._hears_soon = False
        until = monotonic() + _ROUND_SECONDS
        while self._said:
            self._said.popleft()()
            if self._said and monotonic() >= until:
                self._hears_soon = True
                self._loop.call_soon(self._hear)
                return

    def _tell(self, tell: Callable[..., None], *news: object) -> None:
        if not self.ended:
            self._guard("lane_frame", None, tell, *news)

    def _welcome(self, welcome: Welcome) -> None:
        self.welcomed = True
        self._on_welcome(welcome)

    def _begun(self, number: int, heard: Callable[[], None] | None) -> None:
        carried = self._calls.get(number)
        if carried is not None and carried.started is not None and carried.started() and heard is not None:
            heard()

    def _replied(self, number: int, reply: Reply, body: Body) -> None:
        carried = self._forget(number)
        try:
            if carried is None:
                return
            if reply.HasField("failure"):
                carried.listener.failed(raised(reply.failure), reply)
            else:
                carried.listener.replied(reply, body)
        except Exception as error:  # noqa: BLE001 (a guard in line: on every call's path)
            assert carried is not None
            self._guard("lane_failure", None, carried.listener.failed, self._guard.caught("lane_reply", error))
        finally:
            if body.when_freed is not None:
                # A reader that needs it for longer has a cursor.
                body.let_go()

    # Bodies that are large, or still arrive.

    def _more(self, carried: _Carried) -> None:
        """Feed a call when its turn comes: there are more of its bytes."""
        if carried not in self._feeding:
            self._feeding.append(carried)
            self._feeds.start()

    def _feed_all(self) -> Iterator[None]:
        """Feed one piece of each body by turns. Yields after each piece (a ByTurns step)."""
        while self._feeding:
            carried = self._feeding.popleft()
            self._guard("lane_piece", carried.number, self._feed, carried)
            yield

    def _feed(self, carried: _Carried) -> None:
        if carried.feed():
            self._feeding.append(carried)

    # How calls end.

    def _break_off(self, number: int, error: UnlatchError) -> None:
        """Answer one call after an exception in our own code, and abandon what was accepted of it."""
        if (carried := self._calls.get(number)) is not None:
            self._abandon(carried)
            self.fail(number, error)

    def _abandon(self, carried: _Carried) -> None:
        if (accepted := carried.release()) is not None:
            self._guard("lane_cancel", None, accepted.abandon)

    def _lose_all(self) -> Iterator[None]:
        """Abandon every call and tell its listener that the lane has ended. Yields after each (a by_turns step)."""
        for number in list(self._calls):
            # A listener that is told may cancel others.
            if (carried := self._forget(number)) is not None:
                self._abandon(carried)
                lost = Unavailable("the lane to the server broke before the reply was here")
                self._guard("lane_failure", None, carried.listener.failed, lost)
            yield

    def _forget(self, number: int) -> _Carried | None:
        carried = self._calls.pop(number, None)
        if not self._calls:
            self._quiet.set()
            self._end_if_finished()
        return carried

    def _end_if_finished(self) -> None:
        if self.finishing and not self._calls:
            self._over.set()
