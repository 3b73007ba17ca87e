"""ModelInfer in both ways that a gateway accepts its calls: several at a time, or one after the other."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conftest import StartMesh
from tests.support.doors import Oip, request
from tests.support.http2 import Http2
from tests.support.watching import Gate, Scrape, wait_until

INFER = "/inference.GRPCInferenceService/ModelInfer"
WAYS = {"several at a time": (), "one after the other": ("--no-accept-ahead",)}


@pytest.mark.parametrize("way", WAYS)
def test_calls_are_served_in_both_ways(way: str, start_mesh: StartMesh, tmp_path: Path) -> None:
    """Answers, refusals, requests that do not come whole, callers who leave, and a drain with calls in flight."""
    mesh = start_mesh(gateway=("--message-seconds", "3", *WAYS[way]))
    gates = [Gate(tmp_path / name) for name in ("left", "drained")]

    def waits(gate: Gate) -> bytes:
        return request("waits_for", path=str(gate)).SerializeToString()

    def handled() -> dict[str, float]:
        scrape = Scrape(mesh.gateway_metrics)
        codes = ("OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "CANCELLED")
        return {
            code: scrape.sum("grpc_server_handled_total", grpc_method="ModelInfer", grpc_code=code) for code in codes
        }

    with (
        ThreadPoolExecutor(40) as threads,
        grpc.insecure_channel(mesh.gateway) as channel,
        Http2(mesh.gateway) as halting,
    ):
        # 1 KiB is announced, and one byte of it comes.
        stream = halting.begin(INFER)
        halting.h2.send_data(stream, b"\x00\x00\x00\x04\x00x")
        halting.flush()
        oip = Oip(channel)
        assert all(threads.map(lambda _: oip.serves(), range(200)))
        refusals = Counter(threads.map(lambda _: oip.refusal(b"no message").code, range(40)))
        assert refusals == {"INVALID_ARGUMENT": 40}
        assert halting.trailers(stream)["grpc-status"] == "4"
        infer: Any = channel.unary_unary(INFER)
        leaving = infer.future(waits(gates[0]))
        wait_until(lambda: gates[0].reached, "the first is with its worker")
        leaving.cancel()
        counted = {"OK": 200, "INVALID_ARGUMENT": 40, "DEADLINE_EXCEEDED": 1, "CANCELLED": 1}
        wait_until(lambda: handled() == counted, "every RPC is counted")
        assert Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 0
        answered = infer.future(waits(gates[1]))
        wait_until(lambda: gates[1].reached, "the second is with its worker")
        stopping = threads.submit(mesh.gateway_service.stop)
        mesh.gateway_service.wait_for("draining")
        gates[1].open()
        answered.result()
    stopping.result()
    assert "RPCs are accepted one at a time" not in str(mesh.gateway_service.entries)
