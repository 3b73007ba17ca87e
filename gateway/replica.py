"""One replica: its lane, opened again whenever it breaks, and what it grants."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from common.lane import MAX_MESSAGE_BYTES, METHOD, Body, ProtocolViolation
from common.lane_caller import LaneCaller, Waiter
from common.rpc import options
from common.tls import ChannelSecurity
from protos.unlatch_pb2 import Descriptor, Kernel, Welcome

log = structlog.get_logger()

# A lane that broke is opened again soon, but not by all gateways at once.
_FIRST_BACKOFF_SECONDS = 0.05
_LONGEST_BACKOFF_SECONDS = 2.0
_CHANNEL_OPTIONS = [
    *options(MAX_MESSAGE_BYTES),
    # gRPC's own backoff starts at a second; ours is above it.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Outgoing(Waiter, Protocol):
    """A call on its way to a replica."""

    descriptor: Descriptor
    body: Body

    def remaining_microseconds(self) -> int:
        """What is left of its time."""


class Replica:
    """`on_change` is called when what it serves, grants or takes has changed."""

    def __init__(
        self, target: str, on_change: Callable[["Replica"], None], security: ChannelSecurity, grace_seconds: float
    ) -> None:
        self.target = target
        self._security = security
        self._grace_seconds = grace_seconds
        self.kernels: dict[str, Kernel] = {}
        self.takes_calls = False
        self._on_change = on_change
        # The one that calls go to.
        self._lane: LaneCaller | None = None
        self._no_lane_because = ""
        self._welcome = Welcome()
        self._calls = 0
        self._bytes = 0

    @property
    def name(self) -> str:
        """What it calls itself."""
        return self._welcome.server

    def has_room(self, size: int) -> bool:
        """Whether a call of `size` bytes fits its window. A call larger than the whole window goes alone."""
        granted = self._welcome
        return (
            self.takes_calls
            and self._lane is not None
            and not self._lane.ended
            and self._calls < granted.window_calls
            and (self._bytes + size <= granted.window_bytes or not self._calls)
        )

    def send(self, call: Outgoing) -> tuple[LaneCaller, int]:
        """Send a call, and tell the lane that it is on and its number there."""
        assert self._lane is not None
        self._calls += 1
        self._bytes += call.body.size
        call.descriptor.remaining_microseconds = call.remaining_microseconds()
        return self._lane, self._lane.call(call.descriptor, call.body, call)

    def ended(self, call: Outgoing) -> None:
        """A call that was sent has ended: its part of the window is free."""
        self._calls -= 1
        self._bytes -= call.body.size

    async def run(self) -> None:
        """Keep a lane open, for ever: another once it has broken, or beside it where either end wants a new handshake.

        Calls go to the old one until the new one is there. Then it ends when they are answered, in any case in time.
        """
        loop, failures = asyncio.get_running_loop(), 0
        async with asyncio.TaskGroup() as lanes:
            while True:
                lane = self._new_lane()
                carrying = lanes.create_task(self._carry(lane))
                await self._security.until_another_is_wanted(lane, carrying)
                failures = 0 if lane.welcomed else failures + 1
                if not carrying.done():
                    loop.call_later(self._grace_seconds, self._cut_off, lane, carrying)
                longest = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2 ** min(failures, 10))
                await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 (jitter)

    def _new_lane(self) -> LaneCaller:
        lane = LaneCaller(lambda welcome: self._welcomed(lane, welcome), lambda: self._drains(lane))
        return lane

    async def _carry(self, lane: LaneCaller) -> None:
        """One lane, from its opening to its end."""
        async with self._security.open_channel(self.target, _CHANNEL_OPTIONS) as channel:
            stream: Any = channel.stream_stream(METHOD)()
            reason = "it closed the lane"
            try:
                await lane.run(stream)
            except asyncio.CancelledError:
                # It is us who close it.
                self.takes_calls = self.takes_calls and lane is not self._lane
                raise
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            except ProtocolViolation as violation:
                reason = str(violation)
            finally:
                stream.cancel()
                self._lost(lane, reason)

    def _cut_off(self, lane: LaneCaller, carrying: asyncio.Task[None]) -> None:
        self._lost(lane, "no other could be opened in its place, by the certificates that hold now")
        carrying.cancel()

    def _welcomed(self, lane: LaneCaller, welcome: Welcome) -> None:
        if lane is not self._lane:
            if lane.finishing:
                return
            if self._lane is not None:
                self._lane.finish()
            self._lane = lane
        self._welcome = welcome
        self.kernels = {kernel.name: kernel for kernel in welcome.kernels}
        self.takes_calls = True
        self._no_lane_because = ""
        log.info("replica is ready", replica=self.target, name=welcome.server, kernels=len(self.kernels))
        self._on_change(self)

    def _drains(self, lane: LaneCaller) -> None:
        if lane is self._lane:
            log.info("replica drains", replica=self.target)
            self.takes_calls = False
            self._on_change(self)

    def _lost(self, lane: LaneCaller, reason: str) -> None:
        if not lane.welcomed and reason != self._no_lane_because:
            # Once, and not with every attempt: a replica may be away for long.
            self._no_lane_because = reason
            log.warning("no lane to replica", replica=self.target, reason=reason)
        if self._lane not in (lane, None):
            return
        self._lane = None
        if self.takes_calls:
            log.warning("lane to replica broke", replica=self.target, reason=reason)
        self.takes_calls = False
        self.kernels = {}
        self._on_change(self)
