"""Metrics of several units on one port: all that each unit says, with its number, whatever becomes of the others."""

import gzip
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary, generate_latest
from prometheus_client.metrics_core import Metric, UntypedMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from structlog.testing import capture_logs

from tests.support.mesh import ROOT
from tests.support.watching import wait_until
from unlatch.common.net.addresses import unix_name
from unlatch.common.service.metrics_server import serve_metrics
from unlatch.common.telemetry.recorder import Recorder
from unlatch.supervisor import metrics
from unlatch.supervisor.metrics import UnitsMetrics, serve_units_metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(families: Iterable[Metric]) -> Samples:
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def recorder(calls: float) -> Recorder:
    """A unit's metrics: counters, a histogram and a gauge, with label values that need escapes."""
    made = Recorder()
    made.counter("calls_total", 'Calls, by "kernel" \\ code.', ("kernel", "code")).add(calls, 'a"b\\n{c},d="e"}', "OK")
    made.histogram("run_seconds", "Runs.", ("kernel",), (0.1, 1)).observe(calls / 10, "fft")
    made.gauge("depth", "Depth.").set(calls)
    made.counter("lost_total", "Lost workers.", ("reason",))
    return made


@contextmanager
def unit(address: str, *collectors: Collector) -> Iterator[None]:
    """A unit: only its metrics."""
    bound, close = serve_metrics(address, collectors)
    assert bound == address
    try:
        yield
    finally:
        close()


def fetched(address: str, **headers: str) -> tuple[str, str]:
    """Return the type and the text of /metrics."""
    request = urllib.request.Request(f"http://{address}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        body = answer.read()
    return answer.headers["Content-Type"], (
        gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body
    ).decode()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that a busy machine keeps to."""
    monkeypatch.setattr(metrics, "_READ_SECONDS", 30.0)


@pytest.mark.usefixtures("patience")
def test_all_units_are_one_scrape(tmp_path: Path) -> None:
    """Each unit's series have its number, series of a name are one family, and the supervisor tells of itself."""
    addresses = {number: f"unix:{tmp_path}/{number}" for number in ("0", "1")}
    with (
        unit(addresses["0"], recorder(2)),
        unit(addresses["1"], recorder(5)),
        serve_units_metrics("127.0.0.1:0", addresses) as address,
    ):
        _, text = fetched(address)
        zipped = fetched(address, **{"Accept-Encoding": "gzip"})[1]
        kind, told = fetched(address, Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    of_open_metrics: Iterable[Metric] = open_metrics_families(told)  # type: ignore[no-untyped-call]
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert {family.name: (family.type, family.documentation) for family in families if family.name == "calls"} == {
        "calls": ("counter", 'Calls, by "kernel" \\ code.')
    }
    assert "lost" in names
    given = samples(families)
    of_process = {name for name, labels in given if ("process", "supervisor") in labels}
    assert "unlatch_process_cpu_seconds_total" in of_process
    assert {dict(labels).get("unit") for name, labels in given if name in of_process} == {None}
    expected: Samples = {key("unlatch_unit_up", unit="0"): 1.0, key("unlatch_unit_up", unit="1"): 1.0}
    for number, calls in (("0", 2.0), ("1", 5.0)):
        registry = CollectorRegistry()
        registry.register(recorder(calls))
        own = samples(text_string_to_metric_families(generate_latest(registry).decode()))
        expected |= {(name, labels | {("unit", number)}): value for (name, labels), value in own.items()}
    assert {series: value for series, value in given.items() if series[0] not in of_process} == expected
    for again in (text_string_to_metric_families(zipped), of_open_metrics):
        found = samples(again)
        assert {series: found[series] for series in expected} == expected


@pytest.mark.usefixtures("patience")
def test_unit_that_ends_and_returns(tmp_path: Path) -> None:
    """The series of a unit that is not there are left out, and are there again when it is, from 0."""
    metrics = UnitsMetrics({"0": f"unix:{tmp_path}/0", "1": f"unix:{tmp_path}/1"})
    with unit(f"unix:{tmp_path}/0", recorder(2)):
        with unit(f"unix:{tmp_path}/1", recorder(5)):
            assert samples(metrics.collect())[key("depth", unit="1")] == 5
        ended = samples(metrics.collect())
        assert ended[key("unlatch_unit_up", unit="1")] == 0
        assert {dict(labels)["unit"] for name, labels in ended if name != "unlatch_unit_up"} == {"0"}
        with unit(f"unix:{tmp_path}/1", recorder(0)):
            again = samples(metrics.collect())
    assert again[key("unlatch_unit_up", unit="1")] == 1
    assert again[key("depth", unit="1")] == 0


def says(answer: bytes) -> Callable[[socket.socket], None]:
    """Answer each connection with these bytes."""

    def run(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(1024)
                    connection.sendall(answer)

    return run


def sends_on(part: bytes) -> Callable[[socket.socket], None]:
    """Answer each connection with these bytes again and again, without an end."""

    def run(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    while True:
                        connection.sendall(part)

    return run


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


HEAD = b"# HELP depth Depth.\n# TYPE depth gauge\n"
SILENT: dict[str, Callable[[socket.socket], None] | None] = {
    # As for a stopped process, the system accepts connections, and nothing comes.
    "stopped": None,
    "slow": sends_on(b"#"),
}
# A unit's answer, and what the log says of it.
WRONG: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "endless": (sends_on(b"#" * 65536), "more than 16777216 bytes"),
    "ends early": (says(whole(HEAD + b"depth 1.0\n")[:-4]), "the answer ended after 45 of 49 bytes"),
    "ends at once": (says(b""), "no metrics: b''"),
    "refuses": (says(b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno\n"), "no metrics: b'HTTP/1.1 404 "),
    "no length": (says(b"HTTP/1.1 200 OK\r\n\r\n" + HEAD), "no metrics: b'HTTP/1.1 200 OK'"),
    "no text": (says(whole(b"# HELP depth \xff\n")), "'utf-8' codec can't decode"),
    "no number": (says(whole(HEAD + b"depth one\n")), "could not convert string to float: 'one'"),
    "wrong label": (says(whole(HEAD + b'depth{a="1"b} 1.0\n')), "not a line of metrics: 'depth{a"),
    "no type": (says(whole(b"depth 1.0\n")), "not a line of metrics: 'depth 1.0'"),
}


@contextmanager
def answering(address: str, answer: Callable[[socket.socket], None] | None) -> Iterator[None]:
    """A socket at which nothing else than this answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(unix_name(address))
        listener.listen()
        if answer is not None:
            threading.Thread(target=answer, args=(listener,), daemon=True).start()
        try:
            yield
        finally:
            # Ends an `accept`, too.
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.usefixtures("patience")
def test_wrong_answers_take_nothing_from_other_units(tmp_path: Path) -> None:
    """Units that are not there or answer wrongly are down, the log says why, and the others are whole."""
    reasons = {"not there": "[Errno 2] No such file or directory", **{name: why for name, (_, why) in WRONG.items()}}
    addresses = {name: f"unix:{tmp_path}/{name}" for name in ("first", *reasons, "last")}
    with ExitStack() as stack:
        for name, (answer, _) in WRONG.items():
            stack.enter_context(answering(addresses[name], answer))
        for name in ("first", "last"):
            stack.enter_context(unit(addresses[name], recorder(2)))
        with capture_logs() as logs:
            found = samples(UnitsMetrics(addresses).collect())
    assert up_and_told(found) == ({"first", "last"}, set(reasons), {"first", "last"})
    assert {entry["unit"] for entry in logs} == reasons.keys()
    for entry in logs:
        assert entry["message"].startswith(reasons[entry["unit"]]), entry
        assert entry["address"] == addresses[entry["unit"]]


def test_silent_units_take_nothing_from_other_units(tmp_path: Path) -> None:
    """Units that are stopped, or too slow, are down together after the bound, and the others are whole."""
    addresses = {name: f"unix:{tmp_path}/{name}" for name in ("first", *SILENT, "last")}
    with ExitStack() as stack:
        for name, answer in SILENT.items():
            stack.enter_context(answering(addresses[name], answer))
        for name in ("first", "last"):
            stack.enter_context(unit(addresses[name], recorder(2)))

        def whole() -> bool:
            found = samples(UnitsMetrics(addresses).collect())
            return up_and_told(found) == ({"first", "last"}, set(SILENT), {"first", "last"})

        # A machine that is busy may not let the others answer within the bound, either.
        wait_until(whole, "only silent units are down", 60.0)


def up_and_told(found: Samples) -> tuple[set[str], set[str], set[str]]:
    """Return the units that are up, those that are down, and those that have other series."""
    up = {dict(labels)["unit"]: value for (name, labels), value in found.items() if name == "unlatch_unit_up"}
    others = {dict(labels)["unit"] for name, labels in found if name != "unlatch_unit_up"}
    return {unit for unit in up if up[unit]}, {unit for unit in up if not up[unit]}, others


@pytest.mark.usefixtures("patience")
def test_units_are_read_at_the_same_time(tmp_path: Path) -> None:
    """Three units that each answer only when all have been asked are all up."""
    asked = threading.Barrier(3)

    class Waits:
        def collect(self) -> Iterator[Metric]:
            asked.wait(30)
            yield from recorder(1).collect()

    addresses = {number: f"unix:{tmp_path}/{number}" for number in ("0", "1", "2")}
    with ExitStack() as stack:
        for address in addresses.values():
            stack.enter_context(unit(address, Waits()))
        found = samples(UnitsMetrics(addresses).collect())
    assert [found[key("unlatch_unit_up", unit=number)] for number in addresses] == [1.0, 1.0, 1.0]


VALUES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(label=VALUES, text=VALUES, value=st.floats())
def test_text_is_read_as_prometheus_client_reads_it(label: str, text: str, value: float) -> None:
    """Families of every type, with any text, label and value, are what prometheus_client's own parser finds."""
    registry = CollectorRegistry()
    # The other parser drops white space at both ends of a text.
    about = f"a{text}z"
    Counter("calls", about, ["kernel"], registry=registry).labels(label).inc(3)
    Gauge("depth", about, ["one", "two"], registry=registry).labels(label, "}").set(value)
    Gauge("none", about, ["kernel"], registry=registry)
    histogram = Histogram("run_seconds", about, ["kernel"], registry=registry).labels(label)
    histogram.observe(abs(value))
    Summary("size_bytes", about, registry=registry).observe(value)
    Info("build", about, registry=registry).info({"version": label})
    registry.register(One(UntypedMetricFamily("odd", about, value=value)))
    exposed = generate_latest(registry).decode()
    expected = text_string_to_metric_families(exposed)
    assert [described(family) for family in metrics._parsed(exposed, "7")] == [
        described(family, unit="7") for family in expected
    ]


class One:
    """A collector of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def described(family: Metric, **labels: str) -> tuple[str, ...]:
    """Return all that a family says, as text: a NaN does not equal itself."""
    told = [repr((one.name, sorted({**one.labels, **labels}.items()), float(one.value))) for one in family.samples]
    return family.name, family.documentation, family.type, *told


def test_supervisor_loads_little() -> None:
    """Serving the units' metrics imports neither gRPC nor NumPy nor uvloop."""
    script = "import sys, unlatch.supervisor.supervisor, unlatch.supervisor.metrics; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert "prometheus_client" in loaded
    assert not loaded & {"grpc", "numpy", "uvloop", "google", "multiprocessing"}
