"""Attacks on a gateway, each beside a caller that obeys the rules and is answered throughout."""

import random
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.mesh.security.conftest import Guarded
from tests.support.authority import Authority, Renamed
from tests.support.doors import LARGE, Metadata, Oip, Refusal, descriptor, request, vector
from tests.support.http2 import Http2
from tests.support.issuer import bearer
from tests.support.mesh import running_mesh
from tests.support.watching import Scrape, resident_bytes, wait_until
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage, Piece

MESHES = ("apart", "unit")
MEBIBYTE = 1024 * 1024
INFER = "/inference.GRPCInferenceService/ModelInfer"
# The gateway's own memory may vary by this much: it serves another caller meanwhile.
SWING_BYTES = 48 * MEBIBYTE


@pytest.fixture(scope="module")
def warm(guarded: Guarded) -> Guarded:
    """A gateway that has had large messages: by design it keeps freed memory (common/service/main.py)."""
    for _ in range(4):
        assert unpacked_refusal(guarded, bearer(guarded.issuer.token())).code == "RESOURCE_EXHAUSTED"
    return guarded


def unpacked_refusal(guarded: Guarded, metadata: Metadata) -> Refusal:
    """Send 96 MiB in a hundred KiB."""
    message = request("identity", {"x": np.zeros(12 * MEBIBYTE)})
    with grpc.insecure_channel(guarded.mesh.gateway, LARGE, compression=grpc.Compression.Gzip) as channel:
        return Oip(channel, metadata).refusal(message, timeout=60)


@pytest.fixture(autouse=True)
def bounded(warm: Guarded) -> object:
    """After an attack the gateway is no larger than before, holds no call, and serves."""
    pid = warm.mesh.gateway_service.pid
    with warm.others_served():
        before = resident_bytes(pid)
    yield
    with warm.others_served():
        wait_until(lambda: resident_bytes(pid) - before < SWING_BYTES, "what it took is free again")
    wait_until(lambda: not Scrape(warm.mesh.gateway_metrics).sum("unlatch_calls_in_flight"), "no call is left")


@pytest.mark.parametrize("door", ["oip", "lane"])
def test_oversized_metadata(guarded: Guarded, door: str) -> None:
    """Metadata beyond max_metadata_bytes is refused before it is read."""
    metadata = (*bearer(guarded.issuer.token()), ("x-much", "a" * 60_000))
    with guarded.others_served():
        assert guarded.refused(door, metadata).code == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("who", ["known caller", "stranger"])
def test_message_that_grows_when_it_is_unpacked(guarded: Guarded, who: str) -> None:
    """96 MiB in a hundred KiB: the limit counts unpacked bytes, and an unknown caller's message is not unpacked."""
    metadata = bearer(guarded.issuer.token()) if who == "known caller" else ()
    peak = resident_bytes(guarded.mesh.gateway_service.pid)
    with guarded.others_served():
        refusal = unpacked_refusal(guarded, metadata)
        peak = resident_bytes(guarded.mesh.gateway_service.pid) - peak
    assert refusal.code == ("UNAUTHENTICATED" if who == "stranger" else "RESOURCE_EXHAUSTED"), refusal
    assert peak < 96 * MEBIBYTE


@pytest.mark.parametrize("who", ["known caller", "stranger"])
def test_ten_thousand_streams_opened_and_reset(guarded: Guarded, who: str) -> None:
    """Streams are opened and reset as fast as they can be written (CVE-2023-44487)."""
    metadata = bearer(guarded.issuer.token()) if who == "known caller" else ()
    opened = 0
    with guarded.others_served(), ExitStack() as stack:
        connection = stack.enter_context(Http2(guarded.mesh.gateway))
        while opened < 10_000:
            try:
                for _ in range(100):
                    connection.h2.reset_stream(connection.begin(INFER, metadata), 8)
                    opened += 1
                connection.flush()
            except OSError:
                # The gateway has closed this connection.
                connection = stack.enter_context(Http2(guarded.mesh.gateway))


def test_connections_that_say_nothing_are_closed(guarded: Guarded) -> None:
    """Half of a handshake, a single word, a byte now and then: after handshake_seconds the connection is closed."""
    with guarded.others_served(), ExitStack() as stack:
        silent = [stack.enter_context(_connected(guarded.mesh.gateway)) for _ in range(20)]
        talking = [stack.enter_context(_connected(guarded.mesh.gateway)) for _ in range(20)]
        for one in talking:
            one.sendall(b"PRI * HTTP/2.0\r\n")
        for one in (*silent, *talking):
            assert _ended(one)


def test_handshakes_that_never_end(tmp_path: Path) -> None:
    """No handshake, half of a hello, TLS without a word of HTTP/2: they are closed, and others are served."""
    authority = Authority()
    files = Renamed(tmp_path / "files", {**authority.issue("127.0.0.1"), "ca.crt": authority.pem})
    flags = ("--tls-cert", files["tls.crt"], "--tls-key", files["tls.key"], "--handshake-seconds", "2")
    context = ssl.create_default_context(cafile=files["ca.crt"])
    context.set_alpn_protocols(["h2"])
    credentials = grpc.ssl_channel_credentials(authority.pem)
    with running_mesh(tmp_path, gateway=flags) as mesh, ExitStack() as stack:
        oip = Oip(stack.enter_context(grpc.secure_channel(mesh.gateway, credentials)))
        assert oip.serves()
        silent = [stack.enter_context(_connected(mesh.gateway)) for _ in range(20)]
        halting = [stack.enter_context(_connected(mesh.gateway)) for _ in range(20)]
        for one in halting:
            one.sendall(_hello(context)[:100])
        shaken = [
            stack.enter_context(context.wrap_socket(_connected(mesh.gateway), server_hostname="127.0.0.1"))
            for _ in range(20)
        ]
        for one in shaken[:10]:
            one.sendall(b"PRI * HTTP/2.0\r\n")
        ending = [threading.Thread(target=_ended, args=(one,)) for one in (*silent, *halting, *shaken)]
        for thread in ending:
            thread.start()
        while any(thread.is_alive() for thread in ending):
            assert oip.serves()


def test_headers_that_drip(guarded: Guarded) -> None:
    """An RPC with endless headers delays no other. An RPC with an endless message is ended."""
    with guarded.others_served(), Http2(guarded.mesh.gateway) as headers, Http2(guarded.mesh.gateway) as message:
        # HEADERS of one byte on stream 1, without END_HEADERS.
        headers.raw(b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x83")
        stream = message.begin(INFER, bearer(guarded.issuer.token()))
        # 1 KiB is announced, and one byte of it comes.
        message.h2.send_data(stream, b"\x00\x00\x00\x04\x00x")
        message.flush()
        trailers = message.trailers(stream)
        assert trailers["grpc-status"] == "4", trailers
        assert "message_seconds" in trailers["grpc-message"]


def test_stranger_s_message_is_not_waited_for(guarded: Guarded) -> None:
    """A caller without credentials is refused by the headers alone."""
    with Http2(guarded.mesh.gateway) as connection:
        stream = connection.begin(INFER)
        connection.flush()
        assert connection.trailers(stream)["grpc-status"] == "16"


def test_more_connections_than_there_may_be(guarded: Guarded) -> None:
    """Connections beyond the limit are closed. Earlier ones go on, and new ones are taken when some have gone."""
    with guarded.others_served(), ExitStack() as stack:
        connections = [stack.enter_context(_connected(guarded.mesh.gateway)) for _ in range(120)]
        assert sum(map(_ended_at_once, connections)) >= 40
    wait_until(lambda: guarded.oip(guarded.issuer.token()).serves(), "there is room again")


NUMBERS = random.Random(5)
GARBAGE: dict[str, Callable[[], bytes]] = {
    "noise": lambda: NUMBERS.randbytes(1000),
    "half a message": lambda: LaneMessage(payload=[b"x" * 100]).SerializeToString()[:50],
    "too large": lambda: LaneMessage(payload=[bytes(MAX_MESSAGE_BYTES)]).SerializeToString(),
    "entries that nobody declares": lambda: LaneMessage(payload=[b""] * 1000).SerializeToString(),
    "pieces without entries": lambda: LaneMessage(frames=Frames(pieces=[Piece(call=1)] * 1000)).SerializeToString(),
    "many cancels": lambda: LaneMessage(frames=Frames(cancels=range(100_000))).SerializeToString(),
    "many calls": lambda: LaneMessage(
        frames=Frames(calls=[descriptor(n, vector("nowhere"), whole=False) for n in range(1000)])
    ).SerializeToString(),
    "the same call twice": lambda: LaneMessage(
        frames=Frames(calls=[descriptor(1, request("sleeps", None, seconds=1.0))] * 2)
    ).SerializeToString(),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_on_a_lane(guarded: Guarded, what: str) -> None:
    """A known caller that breaks the protocol loses that lane, and gets another one at once."""
    with guarded.others_served():
        with guarded.lane(guarded.issuer.token()) as lane:
            lane.send_bytes(GARBAGE[what]())
            assert lane.end().code == "INVALID_ARGUMENT"
        with guarded.lane(guarded.issuer.token()) as lane:
            assert lane.serves(1)


def test_flood_of_bad_tokens(guarded: Guarded) -> None:
    """Each bad token is different and has a known name: each is checked, and others are served meanwhile."""
    head, claims, signature = guarded.issuer.token().split(".")
    with guarded.others_served(), grpc.insecure_channel(guarded.mesh.gateway) as channel:
        for number in range(500):
            bad = f"{head}.{claims}.{signature[:20]}{number:08d}{signature[28:]}"
            assert Oip(channel, bearer(bad)).refusal(vector("identity", 1.0)).code == "UNAUTHENTICATED"
    seen = Scrape(guarded.mesh.gateway_metrics)
    assert seen.sum("unlatch_unauthenticated_total", reason="wrong_signature") >= 500


def _connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 20.0)


def _hello(context: ssl.SSLContext) -> bytes:
    """Make a client's hello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1").do_handshake()
    return outgoing.read()


def _ended(connection: socket.socket) -> bool:
    """Wait until the other end closes."""
    try:
        while connection.recv(1 << 16):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return True


def _ended_at_once(connection: socket.socket) -> bool:
    """Whether the other end closes within the time in which it greets a connection that may stay."""
    connection.settimeout(0.05)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True
