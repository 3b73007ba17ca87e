"""Callers of both doors who do not read their answers: what they hold is bounded, and it ends."""

import os
from pathlib import Path

import grpc
import pytest

from tests.conftest import StartMesh
from tests.support.doors import LARGE, LaneEnd, Oip, descriptor, request, vector
from tests.support.http2 import Http2
from tests.support.watching import Scrape, resident_bytes, wait_until
from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.parameters import parameter
from unlatch.common.lane.frames import MAX_UNSENT_BYTES
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, LaneMessage, Request

MEBIBYTE = 1024 * 1024
SERVICE = "/inference.GRPCInferenceService/"
ANSWER_BYTES, CALLS, LIVE_BYTES = 24_000_000, 60, 128 * MEBIBYTE
CODES = ("OK", "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_answers_that_are_not_read_are_bounded_and_end(method: str, start_mesh: StartMesh) -> None:
    """60 requests of 40 bytes, each for 24 MB, on a connection with a window of 0.

    Answers count until gRPC has sent them. In memory they are there twice, and the pieces that they were joined from
    stay in the heap. The calls that do not fit are refused, and counted. Then the caller leaves, or is disconnected,
    and the next one is served.
    """
    mesh = start_mesh(gateway=("--max-live-bytes", str(LIVE_BYTES), "--unread-seconds", "10"))
    pid = mesh.gateway_service.pid
    message = vector("swells", *range(5), count=ANSWER_BYTES).SerializeToString()
    with grpc.insecure_channel(mesh.gateway) as channel:
        Oip(channel).infer(vector("swells", 1.0, count=1))
    before = resident_bytes(pid)

    def ended() -> list[float]:
        scrape = Scrape(mesh.gateway_metrics)
        return [scrape.sum("unlatch_calls_total", kernel="swells", code=code) for code in CODES]

    # Twice, since the heap may keep what it has had once.
    for leaves in (True, False):
        answered_before, refused_before = ended()
        with Http2(mesh.gateway, window=0) as connection:
            if method == "ModelInfer":
                for _ in range(CALLS):
                    connection.send(connection.begin(SERVICE + method), message)
            else:
                connection.send(connection.begin(SERVICE + method), *[message] * CALLS)
            all_calls = CALLS + answered_before + refused_before
            wait_until(lambda: sum(ended()) == all_calls, "every call has ended", 60.0)  # noqa: B023 (this round's)
            answered, refused = ended()[0] - answered_before, ended()[1] - refused_before
            assert 1 <= answered <= LIVE_BYTES // ANSWER_BYTES
            assert answered + refused == CALLS
            assert Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") >= answered
            assert resident_bytes(pid) - before < 3 * LIVE_BYTES
            assert leaves or connection.closed()
        wait_until(lambda: not Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight"), "no call is left")
    with grpc.insecure_channel(mesh.gateway, [("grpc.max_receive_message_length", -1)]) as channel:
        assert len(Oip(channel).infer(vector("swells", 1.0, count=ANSWER_BYTES)).raw_output_contents[0]) == ANSWER_BYTES


def lane_message(number: int, identity: str, kernel: str, **scalars: Value) -> bytes:
    """A message with one call of a kernel, whose argument is one number."""
    call = Descriptor(call=number, lengths=[8], whole=True, request=Request(kernel=kernel, id=identity))
    call.request.tensors.add(name="x", datatype="FP64", shape=[1])
    for name, value in scalars.items():
        call.request.parameters[name].CopyFrom(parameter(value))
    return LaneMessage(frames=Frames(calls=[call]), payload=[bytes(8)]).SerializeToString()


@pytest.mark.parametrize(
    ("identity_bytes", "reply_bytes"), [(10, 60_000), (100_000, 8)], ids=["small replies", "large ids"]
)
def test_replies_on_lanes_that_are_not_read_are_bounded_and_end(
    identity_bytes: int, reply_bytes: int, start_mesh: StartMesh
) -> None:
    """Four lanes on a connection with a window of 0, and calls on each as long as the gateway reads more of them.

    Replies that go beside their frames count, and ids, which each reply repeats. The gateway stops reading, and then
    the caller is disconnected.
    """
    bound = 32 * MEBIBYTE
    mesh = start_mesh(gateway=("--max-live-bytes", str(bound), "--unread-seconds", "20"))
    with grpc.insecure_channel(mesh.gateway) as channel:
        Oip(channel).infer(vector("swells", 1.0, count=1))
    processes = [mesh.gateway_service.pid, mesh.dispatcher_service.pid]
    before = [resident_bytes(pid) for pid in processes]

    def none_in_flight() -> bool:
        return not Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight")

    with Http2(mesh.gateway, window=0) as connection:
        lanes = [connection.begin("/unlatch.v1.Lane/Open") for _ in range(4)]
        # Far more than the bound, if all were read. The window of a lane allows 1,024 calls.
        for number in range(1, 10_000):
            message = lane_message(number, "i" * identity_bytes, "swells", count=reply_bytes)
            lanes = [lane for lane in lanes if connection.offer(lane, message, 1.0)]
            if not lanes:
                break
            if number % 200 == 0:
                wait_until(none_in_flight, "calls that were read have ended")
        assert not lanes, "the gateway reads on"
        for pid, was in zip(processes, before, strict=True):
            assert resident_bytes(pid) - was < 2 * bound
        assert connection.closed()
    wait_until(none_in_flight, "no call is left")
    with grpc.insecure_channel(mesh.gateway) as channel:
        assert Oip(channel).serves()


def test_replies_that_gateways_do_not_read_are_bounded(start_mesh: StartMesh) -> None:
    """30 lanes to a replica with a window of 0, and calls on each as long as the replica reads more of them.

    A replica has a bound for a lane, and one for all lanes, which is a quarter of what those of 30 lanes add up to.
    Another lane is served meanwhile.
    """
    bound = 8 * MAX_UNSENT_BYTES
    mesh = start_mesh()
    pid = mesh.dispatcher_service.pid
    with grpc.insecure_channel(mesh.gateway) as channel, Http2(mesh.dispatcher, window=0) as connection:
        Oip(channel).infer(vector("swells", 1.0, count=1))
        before = resident_bytes(pid)
        lanes = [connection.begin("/unlatch.v1.Lane/Open") for _ in range(30)]
        for number in range(1, 1000):
            message = lane_message(number, "i" * 1000, "swells", count=60_000)
            lanes = [lane for lane in lanes if connection.offer(lane, message, 0.4)]
            if not lanes:
                break
            if number % 20 == 0:
                wait_until(lambda: not Scrape(mesh.dispatcher_metrics).sum("unlatch_queue_depth"), "all were run", 60.0)
        assert not lanes, "the replica reads on"
        assert resident_bytes(pid) - before < 2 * bound
        assert Oip(channel).serves()


def test_calls_that_wait_with_large_ids_are_bounded(start_mesh: StartMesh, tmp_path: Path) -> None:
    """Descriptors count while their calls wait: those that do not fit are refused, and those that fit are answered."""
    bound, identity_bytes, calls = 32 * MEBIBYTE, 100_000, 600
    mesh = start_mesh(gateway=("--max-live-bytes", str(bound)))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    processes = [mesh.gateway_service.pid, mesh.dispatcher_service.pid]
    with grpc.insecure_channel(mesh.gateway, LARGE) as channel, LaneEnd(channel, within=60.0) as lane:
        before = [resident_bytes(pid) for pid in processes]
        for number in range(1, calls + 1):
            call = descriptor(number, request("waits_for", path=str(gate)))
            call.request.id = f"{number}-".ljust(identity_bytes, "i")
            call.remaining_microseconds = 50_000_000
            lane.send(Frames(calls=[call]))
        for number in range(calls, calls - 200, -1):
            assert f"max_live_bytes={bound}" in lane.first_frame(number).failure.message
        for pid, was in zip(processes, before, strict=True):
            assert resident_bytes(pid) - was < 2 * bound
        with gate.open("wb"):
            pass
        assert lane.reply(1)[0].HasField("response")


def test_lanes_are_bounded_and_do_not_keep_others_out(start_mesh: StartMesh) -> None:
    """Of 800 lanes opened at once those up to max_lanes stay, idle, while other callers' calls are answered."""
    mesh = start_mesh(gateway=("--max-lanes", "500"))
    with grpc.insecure_channel(mesh.gateway) as channel, Http2(mesh.gateway) as connection:
        oip = Oip(channel)
        assert oip.serves()
        before = resident_bytes(mesh.gateway_service.pid)
        lanes = [connection.begin("/unlatch.v1.Lane/Open") for _ in range(800)]
        connection.flush()
        assert oip.serves()
        assert connection.trailers(lanes[-1])["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert oip.serves()
        scrape = Scrape(mesh.gateway_metrics)
        assert scrape.sum("unlatch_lanes") == 500
        assert scrape.sum("unlatch_lanes_refused_total", code="RESOURCE_EXHAUSTED") == 300
        assert resident_bytes(mesh.gateway_service.pid) - before < 500 * 256 * 1024
