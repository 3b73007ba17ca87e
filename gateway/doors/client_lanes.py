"""Lanes of Python clients: their calls take the same path as any other, and pieces pass through as they come.

A lane's caller is authenticated when the lane opens, for as long as the token or certificate holds that it came with.
Before a token ends the lane asks for another. Without one new calls are refused; those that are under way are answered,
if that takes no longer than `tls_grace_seconds`, and then the lane is closed.
"""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from time import time
from typing import Any

import structlog

from unlatch.common.errors import InvalidArgument, ResourceExhausted, Unauthenticated, UnlatchError
from unlatch.common.fair import ByTurns
from unlatch.common.lane.body import Body, kept
from unlatch.common.lane.frames import MAX_DESCRIPTOR_BYTES
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.listener import Caught
from unlatch.common.lane.server import LaneServer
from unlatch.common.net.rpc import abort
from unlatch.gateway.calls.calls import Calls, LiveCall
from unlatch.gateway.doors.fields import descriptor_too_large, name_as_protocol
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.identity import Identity
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.gateway.totals import MachineTotals
from unlatch.protos.unlatch_pb2 import Descriptor, Reply

log = structlog.get_logger()

# How long before a token ends its lane asks for another: in seconds, or as a part of its time if that is less.
_ASK_SECONDS = 30.0
_ASK_PART = 0.2
# How long a token still holds whose key was taken away, so that its caller can send another.
_GRACE_SECONDS = 2.0
# No timer runs for longer: the clock by which tokens end may be set, or the machine may have slept.
_LOOK_SECONDS = 60.0
_CHECKED_AT_ONCE = 16
_ENDED = "the lane's token has ended, and the caller has sent no other"


class ClientLanes:
    """Opens lanes of clients, and begins the calls that they bring."""

    def __init__(
        self,
        calls: Calls,
        lanes: Lanes,
        authentication: Authentication,
        tenants: Tenants,
        *,
        max_lanes: int,
        stalled_call_seconds: float,
        grace_seconds: float,
        caught: Caught,
        metrics: GatewayMetrics,
        totals: MachineTotals | None = None,
    ) -> None:
        self._calls = calls
        self._lanes = lanes
        self._authentication = authentication
        self._tenants = tenants
        self._max_lanes = max_lanes
        self._totals = totals or MachineTotals()
        self._stalled_call_seconds = stalled_call_seconds
        self._grace_seconds = grace_seconds
        self.caught = caught
        self._open: set[_ClientLane] = set()
        metrics.lanes(lambda: float(len(self._open)))
        self._refused = partial(metrics.lanes_refused.add, 1)
        # Checks every lane's token again. There may be many lanes.
        self.checking = ByTurns(self._check, at_once=_CHECKED_AT_ONCE, caught=partial(caught, "client_token"))

    async def open(self, _: object, context: Any) -> None:
        """Run the RPC of a lane. Its caller is authenticated before anything that comes on the lane is read."""
        try:
            identity, token = self._authentication.identify(context)
            tenant = self._tenants.of(identity.name)
            self._check_room(tenant)
        except UnlatchError as error:
            self._refused(error.status)
            await abort(context, error)
        except Exception as error:  # noqa: BLE001 (the guard: the caller hears of it)
            await abort(context, self.caught("client_lane", error))
        lane = _ClientLane(self, identity, token, tenant)
        self._open.add(lane)
        self._count()
        tenant.lanes += 1
        try:
            # The client needs the kernels for its calls, and would refuse them itself.
            await self._calls.fleets.of(tenant.name).until_known()
            await lane.run(self._lanes, context, tenant.name)
        finally:
            tenant.lanes -= 1
            self._open.discard(lane)
            self._count()

    def _count(self) -> None:
        self._totals.own.lanes = len(self._open)

    def _check_room(self, tenant: Tenant) -> None:
        lanes = len(self._open) + self._totals.elsewhere("lanes")
        if lanes >= self._max_lanes:
            raise ResourceExhausted(
                f"this gateway has max_lanes={self._max_lanes} open already", retry_after_milliseconds=1000
            )
        tenant.check_lane(self._max_lanes, lanes)

    def renewed(self, token: str, name: str) -> Identity:
        """Return the identity of a new token that came on the lane of caller `name`. Raises Unauthenticated."""
        identity = self._authentication.renew(token)
        if identity.name != name:
            raise Unauthenticated("the new token names another caller than the lane's first token")
        return identity

    def close(self, lane: LaneServer, why: str) -> None:
        """Close a lane whose caller is no longer authenticated. Calls that came in time are answered first, if soon."""
        self._lanes.close(lane, Unauthenticated(why), self._grace_seconds)

    def _check(self) -> Iterator[None]:
        for lane in list(self._open):
            lane.check()
            yield

    def begin(
        self,
        lane: LaneServer,
        identity: Identity,
        descriptor: Descriptor,
        whole: list[memoryview] | None,
        ended: Callable[[], None],
    ) -> "_ClientCall | None":
        """Begin a call, or refuse it at once and return None. Call `ended` if the identity has ended."""
        # The gateway sets these, whatever a client writes; fields that this version does not know are dropped.
        descriptor.ClearField("tenant")
        descriptor.ClearField("priority")
        descriptor.ClearField("attempt")
        descriptor.DiscardUnknownFields()
        body = Body(descriptor.lengths, None if whole is None else map(kept, whole))
        remaining = descriptor.remaining_microseconds
        call = _ClientCall(lane, descriptor.call, body)
        try:
            if identity.until <= time():
                ended()
                raise Unauthenticated(_ENDED)
            tenant = self._tenants.of(identity.name)
            if descriptor.ByteSize() > MAX_DESCRIPTOR_BYTES:
                raise descriptor_too_large(descriptor.request.SerializeToString())
        except UnlatchError as error:
            self._calls.refuse(descriptor, error, call)
            return None
        call.live = self._calls.begin(descriptor, body, remaining / 1e6 if remaining else None, call, tenant)
        if call.answered:
            return None
        call.wait_for_bytes(self._stalled_call_seconds)
        return call


class _ClientLane:
    """An open lane, its caller's identity, and until when that holds."""

    def __init__(self, door: ClientLanes, identity: Identity, token: str, tenant: Tenant) -> None:
        self.server = LaneServer(self._accept, door.caught, self._renew, tenant.held)
        self._door = door
        self._identity = identity
        self._token = token
        self._why = _ENDED
        self._asked = self._over = False
        self._changed = asyncio.Event()

    async def run(self, lanes: Lanes, context: Any, tenant: str) -> None:
        """Carry the lane until its caller ends it, or is no longer authenticated."""
        keeping = asyncio.create_task(self._keep(context.peer()))
        try:
            await lanes.carry(self.server, context, tenant)
        finally:
            keeping.cancel()

    def check(self) -> None:
        """Check the token by the new keys. Where it does not hold, ask for another, and close the lane soon."""
        if not self._token or self._over:
            return
        try:
            self._take(self._door.renewed(self._token, self._identity.name))
        except Unauthenticated as error:
            self._lapse(error)
        except Exception as error:  # noqa: BLE001 (the guard: a token that cannot be checked does not hold)
            self._lapse(self._door.caught("client_token", error))

    def _lapse(self, error: UnlatchError) -> None:
        self._why = error.message
        self._ask()
        self._take(Identity(name=self._identity.name, until=min(self._identity.until, time() + _GRACE_SECONDS)))

    def _accept(self, lane: LaneServer, descriptor: Descriptor, whole: list[memoryview] | None) -> "_ClientCall | None":
        # The lane is closed at once if the token has ended: the clock may be set, and no timer notices that.
        return self._door.begin(lane, self._identity, descriptor, whole, self._changed.set)

    def _renew(self, token: str) -> None:
        if self._over:
            return
        try:
            identity = self._door.renewed(token, self._identity.name)
        except Unauthenticated as error:
            # The token before holds until its end.
            self._why = error.message
            return
        self._token = token
        self._asked = False
        self._take(identity)

    def _take(self, identity: Identity) -> None:
        self._identity = identity
        self._changed.set()

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self.server.ask_for_token()

    async def _keep(self, peer: str) -> None:
        """Ask for another token in time, and close the lane when none has come."""
        try:
            await self._until_its_end()
        except Exception as error:  # noqa: BLE001 (the guard: a lane whose end is not watched is closed)
            self._why = self._door.caught("client_token", error).message
        self._over = True
        log.info("lane is closed", peer=peer, tenant=self._identity.name, message=self._why)
        self._door.close(self.server, self._why)

    async def _until_its_end(self) -> None:
        began = time()
        while (left := self._identity.until - time()) > 0:
            wait = left
            if self._token and not self._asked:
                wait = left - min(_ASK_SECONDS, (self._identity.until - began) * _ASK_PART)
                if wait <= 0:
                    self._ask()
                    continue
            self._changed.clear()
            try:
                async with asyncio.timeout(min(wait, _LOOK_SECONDS)):
                    await self._changed.wait()
                began = time()
            except TimeoutError:
                continue


class _ClientCall:
    """A client's call: pieces that its lane takes in go to the call's body, and its reply to the lane."""

    def __init__(self, lane: LaneServer, number: int, body: Body) -> None:
        self.live: LiveCall | None = None
        self.answered = False
        self._lane = lane
        self._number = number
        self._body = body
        # The reply's body that is on its way.
        self._reply_body: Body | None = None
        self._has_fed = False
        self._stalled: asyncio.TimerHandle | None = None

    def feed(self, piece: memoryview) -> None:
        """Take the next piece of the call's body."""
        self._has_fed = True
        self._body.feed(piece)

    def wait_for_bytes(self, seconds: float) -> None:
        """Refuse the call if no more of its bytes come within `seconds`, as long as there are more."""
        if not self._body.complete:
            self._has_fed = False
            self._stalled = asyncio.get_running_loop().call_later(seconds, self._look, seconds)

    def abandon(self) -> None:
        """Give the call up: its caller has left."""
        self.answered = True
        self._leave()

    def replied(self, reply: Reply, body: Body) -> None:
        """Send the reply on the lane, as its pieces come, in place of the one before, if there was one."""
        self.answered = True
        self._reply_body = body
        if body.whole:
            self._lane.reply(self._number, reply, body)
            self._leave()
        else:
            self._lane.reply(self._number, reply, body, partial(self._sent, body))

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        """Send the error on the lane."""
        self.answered = True
        self._stop_looking()
        self._lane.fail(self._number, name_as_protocol(error))

    def _sent(self, body: Body) -> None:
        # Another reply may have taken its place.
        if body is self._reply_body:
            self._leave()

    def _look(self, seconds: float) -> None:
        if self._has_fed:
            self.wait_for_bytes(seconds)
        elif not self.answered and self.live is not None:
            error = InvalidArgument(f"nothing of the call's bytes came for stalled_call_seconds={seconds:g}")
            self.live.failed(error)

    def _stop_looking(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()

    def _leave(self) -> None:
        self._stop_looking()
        if self.live is not None:
            self.live.leave()
