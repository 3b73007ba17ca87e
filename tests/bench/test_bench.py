"""The bench's judgement: which calls failed, which ratios are reported, and which process used the CPU."""

import pytest

from bench.load.load import calls_for, connections, parse
from bench.pool import scan
from bench.pool.measure import share_error
from bench.processes import Seen, label
from bench.report import Findings, document, ratios
from bench.responsive import p99_seconds
from bench.subjects.oip import works
from bench.throughput import Cell
from unlatch.protos import inference_pb2 as pb

REPORT = """
finished in 1.00s, 100.00 req/s, 1.20MB/s
requests: 100 total, 100 started, 100 done, 100 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 100 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.20MB (120000) total, 1.00KB (1024) headers (space savings 90.00%), 102.54KB ({data}) data
                     min         max         mean         sd        +/- sd
time for request:      100us      20.50ms      1.50ms       1.00ms    80.00%
"""


def test_missing_reply_bytes_are_failed_calls() -> None:
    """A gRPC error is HTTP 200 with no message, so fewer DATA bytes than good replies measure are failures."""
    good = parse(REPORT.format(data=100 * 1005), calls=100, reply_bytes=1005)
    short = parse(REPORT.format(data=97 * 1005), calls=100, reply_bytes=1005)
    assert (good.failed_calls, short.failed_calls) == (0, 3)
    assert (good.mean_ms, good.max_ms) == (1.5, 20.5)


def test_excess_reply_bytes_fail_every_call() -> None:
    """More bytes than good replies measure mean that the replies are not those that were checked."""
    assert parse(REPORT.format(data=100 * 1006), calls=100, reply_bytes=1005).failed_calls == 100


@pytest.mark.parametrize(("in_flight", "shape"), [(1, (1, 1)), (32, (4, 8)), (64, (8, 8))])
def test_calls_in_flight_spread_over_connections(in_flight: int, shape: tuple[int, int]) -> None:
    """Each connection gets eight calls."""
    assert connections(in_flight) == shape
    assert calls_for(2.0, 1000.0, in_flight) % in_flight == 0


def test_forked_workers_are_told_from_their_forkserver_by_parentage() -> None:
    """A worker and its forkserver have the same command line, and are told apart by their parents."""
    seen = [
        Seen(pid=1, parent=0, command="python .venv/bin/unlatch serve --listen 127.0.0.1:1"),
        Seen(pid=2, parent=1, command="python -m unlatch gateway"),
        Seen(pid=3, parent=1, command="python -m unlatch compute"),
        Seen(pid=4, parent=3, command="python -c from multiprocessing.forkserver import main"),
        Seen(pid=5, parent=4, command="python -c from multiprocessing.forkserver import main"),
    ]
    assert list(label(seen).values()) == ["supervisor", "gateway", "dispatcher", "forkserver", "workers"]


def test_replies_are_checked_by_content() -> None:
    """The right array passes, and one flipped bit fails."""
    work = works()["identity_1k"]
    raw = work.array.tobytes()
    output = pb.ModelInferResponse.InferOutputTensor(name="output0", datatype="FP64", shape=work.array.shape)
    for sent, wrong in ((raw, False), (bytes([raw[0] ^ 1]) + raw[1:], True)):
        reply = pb.ModelInferResponse(outputs=[output], raw_output_contents=[sent]).SerializeToString()
        assert (work.wrong(reply) is not None) is wrong


def test_ratios_are_taken_within_rounds() -> None:
    """The result is the median of each round's ratio, with its spread. A failed call leaves floor and aim unmet."""
    over = Cell(work="identity_1k", in_flight=32, subject="unlatch", rates=[20.0, 30.0, 80.0], failed_calls=[0, 0, 0])
    under = Cell(work="identity_1k", in_flight=32, subject="recipe", rates=[10.0, 10.0, 20.0], failed_calls=[0, 0, 0])
    ratio = ratios([over, under])["identity_1k_c32_vs_recipe"]
    assert (ratio["value"], ratio["spread"], ratio["floor_met"], ratio["aim_met"]) == (3.0, [2.0, 4.0], True, True)
    over.failed_calls[0] = 1
    assert ratios([over, under])["identity_1k_c32_vs_recipe"]["floor_met"] is False


def test_the_report_keeps_its_names() -> None:
    """Every figure that is asked for has its name, measured or not."""
    written = document(Findings(settings={}))
    assert {
        "identity_1k_c32_vs_recipe",
        "identity_1k_c32_vs_echo",
        "identity_1m_c32_vs_recipe",
        "cpu10_c32_vs_bare",
        "elementwise_c32_vs_bare",
        "map_1k_vs_call",
        "map_1k_vs_gathered",
        "map_1k_vs_unary",
        "gather_16k_vs_map",
    } <= written["ratios"].keys()
    assert {
        "serverlive_p99_ms",
        "health_p99_ms",
        "gateway_loop_lag_p99_ms",
        "dispatcher_loop_lag_p99_ms",
        "small_beside_64mib_delay_ms",
    } <= written["figures"].keys()


def test_p99_of_a_histogram_counts_only_what_was_added() -> None:
    """The quantile is linear within the bucket, as in Prometheus."""
    before = {0.001: 500.0, 0.01: 600.0, float("inf"): 600.0}
    after = {0.001: 598.0, 0.01: 700.0, float("inf"): 700.0}
    assert p99_seconds(before, after) == pytest.approx(0.001 + 0.009 * 0.5)
    assert p99_seconds(after, after) is None


def test_every_figure_of_the_pool_keeps_its_name_and_is_held_against_its_bound() -> None:
    """Each figure is listed, measured or not. A figure at its bound meets it, and one beyond it does not."""
    found = {"replacement_ms_p50": 20.0, "replacement_ms_p99": 100.1, "goodput_ratio": 0.95, "batch_gain": 4.9}
    written = document(Findings(settings={}, pool=found))
    met = {name: figure["met"] for name, figure in written["pool"].items() if figure["value"] is not None}
    assert met == {
        "replacement_ms_p50": True,
        "replacement_ms_p99": False,
        "goodput_ratio": True,
        "batch_gain": False,
    }
    assert {
        "cancel_to_next_ms_p99",
        "short_call_p99_ms",
        "fair_share_error",
        "refusal_ms_p99",
        "batch_alone_ratio",
        "map_cpu_fall",
        "pool_scan_64_vs_2_workers",
    } <= written["figures"].keys()


async def test_scan_serves_every_call_with_stub_workers() -> None:
    """Each load has a figure for few and for many workers, and every call is answered."""
    found = scan.measure(rounds=1, calls=20)
    loads = {f"pool_scan_{load}_{workers}_cpu_us" for load in scan.LOADS for workers in (scan.FEW, scan.MANY)}
    assert found.keys() == {"pool_scan_64_vs_2_workers", *loads}
    assert all(value > 0.0 for value in found.values())


def test_a_share_is_held_against_the_weights() -> None:
    """The error of a share is in percent of what the weights promise. One tenant weighs three times as much."""
    assert share_error({"heavy": 2.0, "equal": 2.0}) == pytest.approx(0.0)
    assert share_error({"heavy": 1.0, "threefold": 3.0}) == pytest.approx(0.0)
    assert share_error({"heavy": 2.0, "threefold": 3.0}) == pytest.approx(60.0)
