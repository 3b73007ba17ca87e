"""A replica as the gateway has it: its lane, opened again whenever it breaks.

    opened ──> welcomed: takes calls ──> drains, or retires ──> its last call is answered ──> closed
       ^           └── broken, or silent for several reports ──┐
       └───────────────────── after a pause ───────────────────┘

A silent replica is lost only if nothing else explains its silence (gateway/fleet/silence.py). Three things keep a call
from a replica: its window is full (gateway/fleet/window.py), it drains or has left the fleet, or it has failed too
often (gateway/fleet/ejection.py).
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from logging import INFO, WARNING
from time import monotonic
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from unlatch.common.backoff import Backoff
from unlatch.common.lane.body import Body
from unlatch.common.lane.caller import LaneCaller
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES, METHOD, ProtocolViolation
from unlatch.common.lane.listener import ReplyListener
from unlatch.common.net.rpc import options
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.waiting.demand import Estimate
from unlatch.gateway.fleet.ejection import LANE, Ejection
from unlatch.gateway.fleet.routed import Routed
from unlatch.gateway.fleet.silence import Silence
from unlatch.gateway.fleet.window import Window
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Load, Process, Welcome

log = structlog.get_logger()

_CHANNEL_OPTIONS = [
    *options(MAX_MESSAGE_BYTES),
    # gRPC's own backoff starts at a second; ours is above it.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection on which nothing is heard any more must not be the next lane's.
    ("grpc.use_local_subchannel_pool", 1),
]
# The time for a lane's welcome, and the time between two looks at the lane until a report says when the next comes.
_WELCOME_SECONDS = 10.0
_FIRST_LOOKS_SECONDS = 0.25


class Lane(Protocol):
    """A lane that carries calls to a replica: a LaneCaller, or a LocalLane within one process."""

    # Whether its welcome has come, whether no more calls go on it, and whether it has ended.
    welcomed: bool
    finishing: bool
    ended: bool

    def call(
        self, descriptor: Descriptor, body: Body, listener: ReplyListener, started: Callable[[], bool] | None = None
    ) -> int:
        """Send a call; returns its number on this lane."""

    def cancel(self, number: int) -> None:
        """Cancel a call that no caller waits for any more."""

    def finish(self) -> None:
        """End the lane once the calls on it are answered; no more calls go on it."""


@dataclass(frozen=True, slots=True)
class ReplicaEvents:
    """Events of a replica that the fleet's members hear of: other kernels or state, room for more calls, a failure."""

    changed: Callable[[], None]
    has_room: Callable[[], None]
    failed: Callable[["Replica", int], None]
    # Counts a report that a replica has missed, by a look that was late by some seconds. Returns whether it is lost.
    missed: Callable[["Replica", float], bool] = lambda _, __: False


class Replica:
    """A replica. `name` is the name that it gives itself, `target` the address that this gateway knows it by."""

    # How much longer a call's way there and back takes than to a replica in this process. 0 in a fleet without one.
    way_seconds = 0.0
    way_seconds_per_byte = 0.0
    # The log level of a lane that cannot be opened, unless the replica has said that it drains.
    away_level = WARNING

    def __init__(
        self,
        target: str,
        events: ReplicaEvents,
        security: ChannelSecurity,
        grace_seconds: float,
        errors: InternalErrors,
    ) -> None:
        self.target = target
        self._security = security
        self._grace_seconds = grace_seconds
        self.kernels: dict[str, Kernel] = {}
        self.takes_calls = False
        self.ejection = Ejection()
        self.window = Window()
        self.silence = Silence()
        self._events = events
        self._errors = errors
        # The lane that calls go to.
        self._lane: Lane | None = None
        self._no_lane_because = ""
        self._welcome = Welcome()
        self.retired = self.draining = False
        self._left = asyncio.Event()
        self._heard = monotonic()

    @property
    def name(self) -> str:
        """The name that the replica gives itself."""
        return self._welcome.server

    @property
    def process(self) -> Process:
        """The process that it runs in; without a name if the replica does not tell."""
        return self._welcome.process

    @property
    def silent_seconds(self) -> float:
        """Seconds since its last message; 0 without a lane."""
        return monotonic() - self._heard if self.takes_calls else 0.0

    def has_room(self, size: int, estimate: Estimate) -> bool:
        """Whether a call of `size` bytes may go there now."""
        if not self.takes_calls or self._lane is None or self._lane.ended:
            return False
        if not self.ejection.trusted and (self.window.calls or self.ejection.ejected):
            return False
        return self.window.has_room(size, estimate)

    def soon_has_room(self, call: Routed) -> bool:
        """Whether a call that has no room there now may wait for it: calls are answered, and that makes room."""
        return self.takes_calls and self.ejection.trusted and bool(self.window.calls) and self is not call.avoids

    def expected_seconds(self, size: int, estimate: Estimate, *, has_room: bool = True) -> float:
        """Seconds until a call of `size` bytes that is sent there, now or when there is room, would be done."""
        way = self.way_seconds + size * self.way_seconds_per_byte
        return self.window.expected_seconds(estimate, has_room=has_room) + way

    def send(self, call: Routed) -> tuple[Lane, int]:
        """Send a call; returns the lane that it is on and its number there."""
        assert self._lane is not None
        call.descriptor.remaining_microseconds = call.remaining_microseconds()
        number = self._lane.call(call.descriptor, call.body, call, call.started)
        # Only now: a call that could not be sent takes no room.
        self.window.take(call.demand.size, call.estimate)
        return self._lane, number

    def ended(self, call: Routed) -> None:
        """Free the part of the window that a call took which was sent and has ended."""
        self.window.give_back(call.demand.size, call.estimate)
        if self.retired and not self.window.calls:
            self._left.set()

    def retire(self) -> None:
        """Take the replica out of the fleet: it gets no new calls, and may answer those that it has."""
        if not self.retired:
            log.info("replica leaves the fleet", replica=self.target, calls=self.window.calls)
            self.retired = True
            self.takes_calls = False
            if not self.window.calls:
                self._left.set()
            self._events.changed()

    def stay(self) -> None:
        """Keep the replica in the fleet, or take it in again if it had left."""
        if self.retired:
            self.retired = False
            self._left.clear()
            if self._lane is not None and self._welcome.kernels and not (self.draining or self._lane.ended):
                self.welcomed(self._lane, self._welcome)

    async def run(self) -> None:
        """Keep a lane open until the replica has retired and its calls are answered, or the task is cancelled.

        Another lane is opened once the lane has broken, or beside it where either end wants a new handshake: calls go
        to the old lane until the new one is there. Then the old one ends when its calls are answered, or else after
        the grace time.
        """
        loop = asyncio.get_running_loop()
        tries = Backoff(first_seconds=0.05, longest_seconds=2.0)
        try:
            async with asyncio.TaskGroup() as lanes:
                while not self.retired:
                    lane = self._new_lane()
                    carrying = lanes.create_task(self._carry(lane))
                    await self._security.until_another_is_wanted(lane.reopen_asked, carrying)
                    if lane.welcomed:
                        tries.succeeded()
                    if not carrying.done():
                        loop.call_later(self._grace_seconds, self._cut_off, lane, carrying)
                    longest = tries.failed()
                    if not self.retired:
                        # Soon, but not by all gateways at once.
                        await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 (jitter)
        finally:
            # However it ends, no call is to go there any more.
            self.takes_calls = False

    def _new_lane(self) -> LaneCaller:
        lane = LaneCaller(
            lambda welcome: self.welcomed(lane, welcome),
            lambda: self.drains(lane),
            self._errors.caught,
            on_load=lambda load: self.reported(lane, load),
        )
        return lane

    async def _carry(self, lane: LaneCaller) -> None:
        """Carry calls on one lane, from its opening to its end."""
        reason = "it closed the lane"
        async with self._security.open_channel(self.target, _CHANNEL_OPTIONS) as channel:
            stream: Any = channel.stream_stream(METHOD)()
            running = asyncio.ensure_future(lane.run(stream))
            watching = asyncio.ensure_future(self._until_silent(lane))
            leaving = asyncio.ensure_future(self._left.wait())
            try:
                await asyncio.wait((running, watching, leaving), return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    await running
                else:
                    reason = watching.result() if watching.done() else "it has left the fleet"
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            except ProtocolViolation as violation:
                reason = str(violation)
            finally:
                # The calls on the lane are told before the lane is called lost, and find no room here.
                for task in (running, watching, leaving):
                    task.cancel()
                await asyncio.gather(running, watching, leaving, return_exceptions=True)
                stream.cancel()
        self.lost(lane, reason)

    async def _until_silent(self, lane: LaneCaller) -> str:
        """Wait until the replica counts as lost, because no message comes; returns the reason to give the lane up.

        Looks are counted, not seconds: after a standstill of this loop, what came meanwhile is read before the next.
        """
        heard = missed = 0
        while True:
            interval = self.window.interval_seconds or _FIRST_LOOKS_SECONDS
            due = monotonic() + interval
            await asyncio.sleep(interval)
            if lane.heard != heard:
                heard, missed = lane.heard, 0
                self._hear(lane)
                continue
            missed += 1
            if self._is_lost(lane, missed, interval, monotonic() - due):
                stopped = ", and its process is stopped" if self.silence.stopped else ""
                return f"nothing was heard of it for {missed * interval:.3g} s{stopped}"

    def _hear(self, lane: LaneCaller) -> None:
        """Note that something has come on a lane."""
        if lane is self._lane:
            self._heard = monotonic()
            self.silence.heard()
            self.window.silent_seconds = 0.0

    def _is_lost(self, lane: LaneCaller, missed: int, interval: float, late_seconds: float) -> bool:
        """Return whether a lane on which nothing came is to be given up, after so many looks in a row."""
        if not lane.welcomed:
            return missed * interval >= _WELCOME_SECONDS
        if lane is not self._lane:
            # An older lane is lost with the present one, or ends after its grace time.
            return self._lane is None
        if not self.window.interval_seconds:
            # A replica of a version that makes no reports may be silent after its welcome.
            return False
        lost = self._events.missed(self, late_seconds)
        self.window.silent_seconds = missed * interval if self.silence.silent else 0.0
        return lost

    def _cut_off(self, lane: LaneCaller, carrying: asyncio.Task[None]) -> None:
        if not carrying.done():
            self.lost(lane, "no other could be opened in its place, by the certificates that hold now")
            carrying.cancel()

    def welcomed(self, lane: Lane, welcome: Welcome) -> None:
        """Take in a lane's welcome, which says what the replica serves: calls go there from now on."""
        if lane is not self._lane:
            if lane.finishing:
                return
            if self._lane is not None:
                self._lane.finish()
            self._lane = lane
        self._welcome = welcome
        self.window.grant(welcome)
        self.kernels = {kernel.name: kernel for kernel in welcome.kernels}
        self.draining = False
        self.takes_calls = not self.retired
        self._heard = monotonic()
        self.silence.heard()
        self._no_lane_because = ""
        log.info("replica is ready", replica=self.target, name=welcome.server, kernels=len(self.kernels))
        self._events.changed()

    def reported(self, lane: Lane, load: Load) -> None:
        """Take in a lane's report, which says how much the replica has to do."""
        # A lane's first report comes before its welcome. Two lanes to one replica report the same.
        self._heard = monotonic()
        if not lane.finishing:
            self.window.hear(load)
            self._events.has_room()

    def drains(self, lane: Lane) -> None:
        """Send no more calls to a lane that drains. Its end may say so several times."""
        if lane is self._lane and not self.draining:
            log.info("replica drains", replica=self.target)
            self.draining = True
            self.takes_calls = False
            self._events.changed()

    def lost(self, lane: Lane, reason: str) -> None:
        """Give up a lane that has ended."""
        # A mistake here must not end the replica's task, nor keep a lane that is to be cut off.
        with self._errors.guarded("replica_lost"):
            self._lose(lane, reason)

    def _lose(self, lane: Lane, reason: str) -> None:
        if not lane.welcomed and reason != self._no_lane_because:
            # Once, and not with every attempt: a replica may be away for long.
            self._no_lane_because = reason
            # A replica that has said that it drains is away as announced.
            level = INFO if self.draining else self.away_level
            log.log(level, "no lane to replica", replica=self.target, message=reason)
        if self._lane not in (lane, None):
            return
        self._lane = None
        self.window.hear(None)
        worked, self.takes_calls, self.kernels = self.takes_calls, False, {}
        if worked:
            log.warning("lane to replica broke", replica=self.target, message=reason)
            self._events.failed(self, LANE)
        self._events.changed()
