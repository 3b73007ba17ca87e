"""The client's lane: its calls take the same path as any other, and their pieces pass through as they come.

Whose lane it is its opening says, and that holds as long as the token or certificate that it came with. Before a token
ends the lane asks for another. Without one new calls are refused; those that are under way are answered, if that takes
no longer than `tls_grace_seconds`, and then the lane is closed.
"""

import asyncio
from functools import partial
from time import time
from typing import Any

import structlog

from unlatch.common.errors import InvalidArgument, Unauthenticated, UnlatchError
from unlatch.common.lane.body import Body, Sink
from unlatch.common.lane.frames import MOST_DESCRIPTOR_BYTES
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.replies import failed
from unlatch.common.lane.server import LaneServer
from unlatch.common.net.rpc import abort
from unlatch.gateway.calls.calls import Call, Calls, too_much_said
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.gateway.tenants.tokens import Identity
from unlatch.protos.unlatch_pb2 import Descriptor, Reply

log = structlog.get_logger()

# How long before a token ends its lane asks for another: by then, or by this part of its time.
_ASK_SECONDS = 30.0
_ASK_PART = 0.2
# What a token that its key's end has ended may still do, so that its caller can come with another.
_GRACE_SECONDS = 2.0
# Nobody's timer runs for longer: the wall clock, by which tokens end, may be set.
_LOOK_SECONDS = 60.0
_CHECKED_AT_ONCE = 16
_ENDED = "the lane's token has ended, and no other has come"


class ClientDoor:
    """Takes in what clients' lanes bring."""

    def __init__(
        self,
        calls: Calls,
        lanes: Lanes,
        authentication: Authentication,
        tenants: Tenants,
        *,
        stalled_call_seconds: float,
        grace_seconds: float,
    ) -> None:
        self._calls = calls
        self._lanes = lanes
        self._authentication = authentication
        self._tenants = tenants
        self._stalled_call_seconds = stalled_call_seconds
        self._grace_seconds = grace_seconds
        self._open: set[_ClientLane] = set()

    async def open(self, _: object, context: Any) -> None:
        """The RPC: who opens a lane is looked at before anything that comes on it."""
        try:
            identity, token = self._authentication.identify(context)
            self._tenants.of(identity.name)
        except UnlatchError as error:
            await abort(context, error)
        lane = _ClientLane(self, identity, token)
        self._open.add(lane)
        try:
            await lane.run(self._lanes, context)
        finally:
            self._open.discard(lane)

    async def check(self) -> None:
        """Look at every lane's token again. By turns, since there may be many."""
        for number, lane in enumerate(list(self._open), 1):
            lane.check()
            if number % _CHECKED_AT_ONCE == 0:
                await asyncio.sleep(0)

    def renewed(self, token: str, name: str) -> Identity:
        """Whom another token is of, that came on a lane of this caller. Raises Unauthenticated."""
        identity = self._authentication.renew(token)
        if identity.name != name:
            raise Unauthenticated("the token that came is another caller's than the lane's")
        return identity

    def close(self, lane: LaneServer, why: str) -> None:
        """Nobody knows any more whose lane it is: what came in time is answered first, if that is soon."""
        self._lanes.close(lane, Unauthenticated(why), self._grace_seconds)

    def begin(
        self, lane: LaneServer, identity: Identity, descriptor: Descriptor, whole: list[memoryview] | None
    ) -> "_ClientCall | None":
        """A client's descriptor begins a call, or is refused at once."""
        # For the gateway to say, whatever a client writes; as is what this version does not know.
        descriptor.ClearField("tenant")
        descriptor.ClearField("priority")
        descriptor.ClearField("attempt")
        descriptor.DiscardUnknownFields()
        body = Body(descriptor.lengths, None if whole is None else list(whole))
        remaining = descriptor.remaining_microseconds
        call = _ClientCall(lane, descriptor.call, body)
        record = self._calls.records.begin(descriptor)
        try:
            if identity.until <= time():
                raise Unauthenticated(_ENDED)
            tenant = self._tenants.of(identity.name)
            if descriptor.ByteSize() > MOST_DESCRIPTOR_BYTES:
                raise too_much_said(descriptor.request.SerializeToString())
        except UnlatchError as error:
            record.refused(error, known=False)
            call.fail(error)
            return None
        try:
            call.call = self._calls.begin(record, body, remaining / 1e6 if remaining else None, call, tenant)
        except UnlatchError as error:
            call.fail(error)
        if call.answered:
            return None
        call.wait_for_bytes(self._stalled_call_seconds)
        return call


class _ClientLane:
    """One lane, whose it is and until when."""

    def __init__(self, door: ClientDoor, identity: Identity, token: str) -> None:
        self.server = LaneServer(self._accept, self._renew)
        self._door = door
        self._identity = identity
        self._token = token
        self._why = _ENDED
        self._asked = self._over = False
        self._changed = asyncio.Event()

    async def run(self, lanes: Lanes, context: Any) -> None:
        """Until it ends: by its caller, or because nobody knows any more whose it is."""
        keeping = asyncio.create_task(self._keep(context.peer()))
        try:
            await lanes.carry(self.server, context)
        finally:
            keeping.cancel()

    def check(self) -> None:
        """The keys for tokens are others now: does its token hold?"""
        if self._token and not self._over:
            try:
                self._take(self._door.renewed(self._token, self._identity.name))
            except Unauthenticated as error:
                self._why = error.message
                self._ask()
                self._take(Identity(name=self._identity.name, until=min(self._identity.until, time() + _GRACE_SECONDS)))

    def _accept(self, lane: LaneServer, descriptor: Descriptor, whole: list[memoryview] | None) -> "_ClientCall | None":
        return self._door.begin(lane, self._identity, descriptor, whole)

    def _renew(self, token: str) -> None:
        if self._over:
            return
        try:
            identity = self._door.renewed(token, self._identity.name)
        except Unauthenticated as error:
            # What it was let in by holds until its end.
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
        await self._until_its_end()
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
    """A client's call as its lane holds it: what arrives goes to the call's body, its answer to the lane."""

    def __init__(self, lane: LaneServer, number: int, body: Body) -> None:
        self.call: Call | None = None
        self.answered = False
        self._lane = lane
        self._number = number
        self._body = body
        # The one that is on its way.
        self._answer: Body | None = None
        self._has_fed = False
        self._waiting: asyncio.TimerHandle | None = None

    @property
    def complete(self) -> bool:
        return self._body.complete

    def feed(self, piece: memoryview) -> None:
        self._has_fed = True
        self._body.feed(piece)

    def wait_for_bytes(self, seconds: float) -> None:
        """See to it that more of its bytes come within the time, as long as there are more."""
        if not self._body.complete:
            self._has_fed = False
            self._waiting = asyncio.get_running_loop().call_later(seconds, self._waited, seconds)

    def abandon(self) -> None:
        self.answered = True
        self._leave()

    def answer(self, reply: Reply, tensors: list[memoryview] | None) -> Sink | None:
        self.answered = True
        body = Body(reply.lengths, None if tensors is None else list(tensors))
        if body.whole:
            self._lane.reply(self._number, reply, body)
            return None
        self._answer = body
        self._lane.reply(self._number, reply, body, partial(self._sent, body))
        return body

    def _sent(self, body: Body) -> None:
        # Another answer may have taken its place.
        if body is self._answer:
            self._leave()

    def fail(self, error: UnlatchError) -> None:
        self.answered = True
        self._lane.reply(self._number, failed(error), Body((), []))

    def _waited(self, seconds: float) -> None:
        if self._has_fed:
            self.wait_for_bytes(seconds)
        elif not self.answered:
            self._leave()
            self.fail(InvalidArgument(f"nothing of the call's bytes came for stalled_call_seconds={seconds:g}"))

    def _leave(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        if self.call is not None:
            self.call.leave()
