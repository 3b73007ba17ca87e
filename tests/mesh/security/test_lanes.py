"""The identity of a client's lane: what its descriptors may claim, and how long its token is good for."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from tests.conftest import StartMesh
from tests.mesh.faults.conftest import gateway_to
from tests.mesh.security.conftest import Guarded
from tests.support.doors import LaneEnd, Oip, descriptor, refusal_of, request, vector
from tests.support.guards import unexpected
from tests.support.issuer import Issuer, bearer, ends
from tests.support.watching import wait_until
from unlatch import BlockingClient, Client
from unlatch.common.errors import PermissionDenied, Unauthenticated, UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES, SERVICE
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.server import LaneServer
from unlatch.common.net.rpc import handlers, options
from unlatch.common.net.unread import unread_answers
from unlatch.protos.unlatch_pb2 import Array, Descriptor, Frames, Kernel, Priority, Reply, Welcome

X = np.arange(3.0)


class Replica:
    """A replica that keeps each descriptor, and answers with nothing."""

    def __init__(self) -> None:
        self.seen: list[Descriptor] = []
        array = Array(name="x", dtypes=["float64"], dims=["n"])
        self._kernels = [Kernel(name="identity", inputs=[array], outputs=[array])]

    async def serve(self, socket: Path, ready: threading.Event, ended: asyncio.Event) -> None:
        lanes = Lanes(
            lambda _: Welcome(server="spy", kernels=self._kernels, window_calls=64, window_bytes=1 << 20),
            unexpected,
            unread_answers(60.0),
        )
        server = grpc.aio.server(options=options(MAX_MESSAGE_BYTES))

        async def opened(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            await lanes.carry(LaneServer(self._accept, unexpected), context)

        server.add_generic_rpc_handlers((handlers(SERVICE, streams={"Open": opened}),))
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        ready.set()
        await ended.wait()
        await server.stop(0)

    def _accept(self, lane: LaneServer, came: Descriptor, _: list[memoryview] | None) -> None:
        kept = Descriptor()
        kept.CopyFrom(came)
        self.seen.append(kept)
        lane.reply(came.call, Reply(), Body((), []))


@contextmanager
def spying_replica(socket: Path) -> Iterator[Replica]:
    """Run such a replica on an event loop of its own."""
    replica, ready, ended = Replica(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(replica.serve(socket, ready, ended),))
    thread.start()
    assert ready.wait(10)
    try:
        yield replica
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def test_what_a_descriptor_claims_is_not_believed(tmp_path: Path) -> None:
    """Tenant, priority and other fields that the gateway sets reach no replica as a client has written them."""
    issuer, socket = Issuer(tmp_path), tmp_path / "dispatcher.sock"
    with spying_replica(socket) as replica, gateway_to(socket, *issuer.flags) as gateway:
        gateway.wait_for("replica is ready")
        address = gateway.wait_for("serving")["listen"]
        claimed = descriptor(1, vector("identity", 1.0))
        claimed.tenant, claimed.priority = "admin", Priority.INTERACTIVE
        # Fields that the gateway sets, and some unknown ones.
        frame = Descriptor.FromString(claimed.SerializeToString() + b"".join(bytes([n << 3, 7]) for n in range(8, 16)))
        with grpc.insecure_channel(address) as channel, LaneEnd(channel, bearer(issuer.token("alice"))) as lane:
            lane.send(Frames(calls=[frame]), *vector("identity", 1.0).raw_input_contents)
            lane.reply(1)
        (seen,) = replica.seen
        seen.ClearField("request")
        seen.ClearField("lengths")
        seen.remaining_microseconds = 0
        assert seen == Descriptor(call=seen.call, whole=True, tenant="alice")


def test_call_s_tenant_is_who_authentication_says_by_the_protocol_s_door(tmp_path: Path) -> None:
    """The descriptor that leaves the gateway is the same for both doors."""
    issuer, socket = Issuer(tmp_path), tmp_path / "dispatcher.sock"
    with spying_replica(socket) as replica, gateway_to(socket, *issuer.flags) as gateway:
        gateway.wait_for("replica is ready")
        with grpc.insecure_channel(gateway.wait_for("serving")["listen"]) as channel:
            Oip(channel, bearer(issuer.token("alice"))).infer(vector("identity", 1.0, priority="background"))
        (seen,) = replica.seen
        assert (seen.tenant, seen.priority) == ("alice", Priority.BACKGROUND)


def test_lane_ends_with_its_token(guarded: Guarded) -> None:
    """Calls in time are answered, later ones are refused, and then the lane is closed with the reason."""
    token = guarded.issuer.token(seconds=2)
    with guarded.lane(token) as lane:
        lane.call(1, request("sleeps", None, seconds=2.5))
        wait_until(lambda: time.time() >= ends(token), "the token has ended")
        lane.call(2, vector("identity", 1.0))
        assert lane.refusal(2).code == "UNAUTHENTICATED"
        assert lane.refusal(1).code == "OK"
        assert lane.end().code == "UNAUTHENTICATED"


def test_lane_whose_token_has_ended_is_cut_off_in_time(guarded: Guarded) -> None:
    """A call that takes longer than the grace does not keep the lane open, and is not answered."""
    with guarded.lane(guarded.issuer.token(seconds=2)) as lane:
        lane.call(1, request("sleeps", None, seconds=60.0))
        with pytest.raises(grpc.RpcError) as raised:
            lane.reply(1)
        refusal = refusal_of(raised.value)
        assert (refusal.code, "token has ended" in refusal.message) == ("UNAUTHENTICATED", True), refusal


def test_lane_goes_on_with_another_token_of_the_same_caller(guarded: Guarded) -> None:
    """A frame renews the token. Another caller's token, or a bad one, renews nothing."""
    token = guarded.issuer.token(seconds=2)
    with guarded.lane(token) as lane, guarded.lane(token) as other:
        lane.send(Frames(authorization=guarded.issuer.token()))
        other.send(Frames(authorization=guarded.issuer.token("modest")))
        other.send(Frames(authorization="nonsense"))
        wait_until(lambda: time.time() >= ends(token), "the token has ended")
        assert lane.serves(1)
        refusal = other.end()
        assert (refusal.code, "can be read" in refusal.message) == ("UNAUTHENTICATED", True), refusal


@pytest.mark.asyncio
async def test_client_renews_its_token_in_time(guarded: Guarded) -> None:
    """With tokens of two seconds no call fails: the gateway asks for a new one in time, on the same lane."""
    asked = 0

    async def token() -> str:
        nonlocal asked
        asked += 1
        return guarded.issuer.token(seconds=2)

    async with Client(guarded.mesh.gateway, token=token, timeout=10) as client:
        await client.identity(X)
        link = client._link
        while asked < 4:
            np.testing.assert_array_equal(await client.identity(X), X)
        assert client._link is link


@pytest.mark.asyncio
async def test_client_is_told_why_it_is_not_let_in(guarded: Guarded) -> None:
    """The error has its own type and quotes nothing. With a good token the same client is served."""
    tokens = [guarded.issuer.token(seconds=-5), guarded.issuer.token("stranger"), guarded.issuer.token()]
    async with Client(guarded.mesh.gateway, token=lambda: tokens.pop(0), timeout=10) as client:
        with pytest.raises(Unauthenticated, match="the token has expired"):
            await client.identity(X)
        with pytest.raises(PermissionDenied):
            await client.identity(X)
        np.testing.assert_array_equal(await client.identity(X), X)

    def broken() -> str:
        raise ValueError(guarded.issuer.token())

    async with Client(guarded.mesh.gateway, token=broken) as client:
        with pytest.raises(Unauthenticated, match="raised ValueError") as raised:
            await client.identity(X)
        assert not any(secret in str(raised.value) for secret in guarded.issuer.secrets)
    with (
        BlockingClient(guarded.mesh.gateway) as without,
        pytest.raises(UnlatchError, match="there is no token"),
    ):
        without.identity(X)


def test_keys_swapped_under_load(start_mesh: StartMesh, tmp_path: Path) -> None:
    """Keys are swapped one by one and no call fails. Afterwards the old key's tokens are refused on all lanes."""
    issuer = Issuer(tmp_path)
    mesh = start_mesh(gateway=issuer.flags)
    log = mesh.gateway_service
    ended = threading.Event()
    old = issuer.token("old", key="first")

    def taken(*keys: str) -> None:
        seen = len(log.lines)
        issuer.publish(*keys)
        log.wait_for("file replaced", after=seen)

    def by_lane(current: list[str]) -> int:
        calls = 0
        with BlockingClient(mesh.gateway, token=lambda: issuer.token(key=current[0]), timeout=10) as client:
            while not ended.is_set():
                np.testing.assert_array_equal(client.identity(X), X)
                calls += 1
        return calls

    def by_oip(current: list[str]) -> int:
        calls = 0
        with grpc.insecure_channel(mesh.gateway) as own:
            while not ended.is_set():
                assert Oip(own, bearer(issuer.token(key=current[0]))).serves()
                calls += 1
        return calls

    current = ["first"]
    with ThreadPoolExecutor() as callers, grpc.insecure_channel(mesh.gateway) as channel:
        loads = [callers.submit(load, current) for load in (by_lane, by_oip)]
        try:
            with LaneEnd(channel, bearer(old)) as stays:
                assert stays.serves(1)
                issuer.new_key("second")
                taken("first", "second")
                current[0] = "second"
                assert stays.serves(2)
                taken("second")
                assert stays.end().code == "UNAUTHENTICATED"
            refusal = Oip(channel, bearer(old)).refusal(vector("identity", 1.0))
            assert (refusal.code, "kid" in refusal.message) == ("UNAUTHENTICATED", True), refusal
            with pytest.raises(grpc.RpcError) as raised, LaneEnd(channel, bearer(old)):
                pass
            assert refusal_of(raised.value).code == "UNAUTHENTICATED"
            # A broken file changes nothing, and the log reports it without its contents.
            seen = len(log.lines)
            issuer.replace(issuer.remember('{"keys": [{"kty": "oct", "k": "c2VjcmV0LXNlY3JldA"}]}'))
            log.wait_for("file not replaced, old content stays", after=seen)
            assert Oip(channel, bearer(issuer.token(key="second"))).serves()
        finally:
            ended.set()
        assert all(load.result() > 10 for load in loads)
    assert not any(secret in "\n".join(log.lines) for secret in issuer.secrets)
