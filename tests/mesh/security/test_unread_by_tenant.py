"""A tenant whose callers do not read, or who fill what they can: it is bounded, and other tenants are served."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.support.doors import LARGE, LaneEnd, Oip, descriptor, refusal_of, vector
from tests.support.http2 import Http2
from tests.support.issuer import Issuer, bearer
from tests.support.mesh import Mesh, running_mesh
from tests.support.watching import Scrape, resident_bytes, wait_until
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage

MEBIBYTE = 1024 * 1024
ANSWER_BYTES, CALLS = 24_000_000, 30
TENANT_BYTES, ALL_BYTES = 64 * MEBIBYTE, 128 * MEBIBYTE
TENANTS = f"[default]\n[tenants.limited]\nlive_bytes = {TENANT_BYTES}\n[tenants.unlimited]\n"
SERVICE = "/inference.GRPCInferenceService/"
MESSAGE = vector("swells", *range(5), count=ANSWER_BYTES)


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


@pytest.fixture
def mesh(tmp_path: Path, issuer: Issuer) -> Iterator[Mesh]:
    """A mesh in which all tenants may hold 128 MiB, one of them 64 MiB by its quota, and others their shares."""
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(TENANTS)
    bounds = ("--max-live-bytes", str(ALL_BYTES), "--unread-seconds", "15", "--tenants", str(tenants))
    with running_mesh(tmp_path, gateway=(*issuer.flags, *bounds)) as running:
        yield running


def unary(connection: Http2, token: str) -> None:
    """Make the calls one by one."""
    for _ in range(CALLS):
        connection.send(connection.begin(SERVICE + "ModelInfer", bearer(token)), MESSAGE.SerializeToString())


def stream(connection: Http2, token: str) -> None:
    """Make the calls on one stream."""
    stream = connection.begin(SERVICE + "ModelStreamInfer", bearer(token))
    connection.send(stream, *[MESSAGE.SerializeToString()] * CALLS)


def lane(connection: Http2, token: str) -> None:
    """Make the calls on one lane."""
    opened = connection.begin("/unlatch.v1.Lane/Open", bearer(token))
    for number in range(1, CALLS + 1):
        call = Frames(calls=[descriptor(number, MESSAGE)])
        message = LaneMessage(frames=call, payload=MESSAGE.raw_input_contents).SerializeToString()
        assert connection.offer(opened, message, 10.0)


def answer_by_protocol(channel: grpc.Channel, token: str) -> int:
    """Make the call, and return the bytes of its answer; 0 for a refusal by a quota."""
    try:
        return len(Oip(channel, bearer(token)).infer(MESSAGE).raw_output_contents[0])
    except grpc.RpcError as error:
        if refusal_of(error).code != "RESOURCE_EXHAUSTED":
            raise
        return 0


def answer_by_lane(channel: grpc.Channel, token: str) -> int:
    """Make the call on a lane of its own, and return the bytes of its answer; 0 for a refusal by a quota."""
    with LaneEnd(channel, bearer(token)) as own:
        own.call(1, MESSAGE)
        reply, answer = own.reply(1)
        assert reply.failure.code in {0, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
        return len(answer)


@pytest.mark.parametrize("tenant", ["limited", "unlimited"])
@pytest.mark.parametrize("door", [unary, stream, lane])
def test_answers_that_are_not_read_count_for_their_tenant(
    door: Callable[[Http2, str], None], tenant: str, mesh: Mesh, issuer: Issuer
) -> None:
    """30 calls of 24 MB on a connection with a window of 0: two answers fit the tenant's quota, or its share.

    Its other calls are refused, by the name of its quota, at each door and on each connection. Another tenant gets
    answers of the same size at each door meanwhile. When the caller leaves, or is disconnected, its tenant is served
    again.
    """
    pid = mesh.gateway_service.pid
    greedy, other = issuer.token(tenant), issuer.token("other")

    def ended() -> list[float]:
        scrape = Scrape(mesh.gateway_metrics)
        codes = ("OK", "RESOURCE_EXHAUSTED")
        return [scrape.sum("unlatch_tenant_calls_total", tenant=tenant, code=code) for code in codes]

    with grpc.insecure_channel(mesh.gateway, LARGE) as channel:
        assert Oip(channel, bearer(other)).serves()
        before = resident_bytes(pid)
        with Http2(mesh.gateway, window=0) as connection:
            door(connection, greedy)
            # On a lane an answer of which the caller reads nothing has not ended.
            wait_until(lambda: ended()[1] == CALLS - TENANT_BYTES // ANSWER_BYTES, "the rest is refused", 30.0)
            refusal = Oip(channel, bearer(greedy)).refusal(MESSAGE)
            assert (refusal.code, refusal.quota) == ("RESOURCE_EXHAUSTED", f"tenant:{tenant}")
            assert f"live_bytes={TENANT_BYTES}" in refusal.message
            with LaneEnd(channel, bearer(greedy)) as own:
                own.call(1, MESSAGE)
                assert own.refusal(1).quota == f"tenant:{tenant}"
            for _ in range(3):
                # It has its last answer a moment before the gateway hears so, and counts its bytes no more.
                wait_until(lambda: answer_by_protocol(channel, other) == ANSWER_BYTES, "another tenant is answered")
                wait_until(
                    lambda: answer_by_lane(channel, other) == ANSWER_BYTES, "another tenant is answered by a lane"
                )
            assert resident_bytes(pid) - before < 3 * ALL_BYTES
            leaves = tenant == "unlimited"
            assert leaves or connection.closed()
        wait_until(lambda: Oip(channel, bearer(greedy)).refusal(MESSAGE).code == "OK", "its tenant is served again")
    # That the caller was cut off during a write is expected.
    assert [entry for entry in mesh.gateway_service.entries if entry["level"] == "error"] == []


def test_small_answers_that_are_not_read_are_bounded_by_tenant(tmp_path: Path, issuer: Issuer) -> None:
    """Of 100 calls that a gateway may hold a tenant gets 50, as long as their answers of 8 bytes are not read."""
    bounds = ("--max-live-calls", "100", "--unread-seconds", "5")
    with (
        running_mesh(tmp_path, gateway=(*issuer.flags, *bounds)) as mesh,
        grpc.insecure_channel(mesh.gateway) as channel,
    ):
        greedy, other = issuer.token("greedy"), issuer.token("other")
        message = vector("identity", 1.0)
        with Http2(mesh.gateway, window=0) as connection:
            for _ in range(120):
                connection.send(connection.begin(SERVICE + "ModelInfer", bearer(greedy)), message.SerializeToString())
            answered = "unlatch_tenant_calls_total"
            wait_until(lambda: Scrape(mesh.gateway_metrics).sum(answered) == 120, "every call has ended")
            assert Scrape(mesh.gateway_metrics).sum(answered, code="OK") == 50
            refusal = Oip(channel, bearer(greedy)).refusal(message)
            assert (refusal.code, refusal.quota) == ("RESOURCE_EXHAUSTED", "tenant:greedy")
            assert "its share of max_live_calls=100: 50" in refusal.message
            assert Oip(channel, bearer(other)).serves()
            assert connection.closed()
        wait_until(lambda: Oip(channel, bearer(greedy)).refusal(message).code == "OK", "its tenant is served again")


def test_idle_lanes_are_bounded_by_tenant(tmp_path: Path, issuer: Issuer) -> None:
    """Of 60 lanes that a gateway may have a tenant gets 30, and another tenant half of those that are left."""
    with (
        running_mesh(tmp_path, gateway=(*issuer.flags, "--max-lanes", "60")) as mesh,
        grpc.insecure_channel(mesh.gateway) as channel,
        Http2(mesh.gateway) as connection,
    ):
        greedy, other = issuer.token("greedy"), issuer.token("other")
        lanes = [connection.begin("/unlatch.v1.Lane/Open", bearer(greedy)) for _ in range(40)]
        connection.flush()
        refusal = connection.trailers(lanes[-1])
        assert refusal["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert "its share of max_lanes=60: 30" in refusal["grpc-message"]
        with ExitStack() as stack:
            for number in range(15):
                assert stack.enter_context(LaneEnd(channel, bearer(other))).serves(number + 1)
            with pytest.raises(grpc.RpcError) as refused, LaneEnd(channel, bearer(other)):
                pass
            assert refusal_of(refused.value).quota == "tenant:other"
