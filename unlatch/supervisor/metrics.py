"""`/metrics` of several units on one port: the supervisor reads the metrics of each unit, and adds the label `unit`.

    Prometheus ──> supervisor ──┬── a Unix socket ──> unit 0
                                └── a Unix socket ──> unit 1

A unit that is stopped or has ended takes nothing from the others: all are read at the same time, within two seconds.
"""

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import structlog
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from unlatch.common.net.addresses import unix_name
from unlatch.common.service.metrics_server import serve_metrics
from unlatch.common.telemetry.processes import ProcessWatch

log = structlog.get_logger()

# Less than what scrapers wait for their answer (Prometheus 10 s, `unlatch top` 5 s), and enough for a unit that hardly
# gets a core.
_READ_SECONDS = 2.0
# A unit writes less than a tenth of this, unless all its labels have as many values as they may.
_MAX_BYTES = 16 * 1024 * 1024
_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: unit\r\n\r\n"

# Lines of the text format, as prometheus_client writes them. Its own parser takes three times as long.
_HEAD = re.compile(r"# (HELP|TYPE) (\w+) (.*)")
_SAMPLE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")


@contextmanager
def serve_units_metrics(listen: str, addresses: Mapping[str, str]) -> Iterator[str]:
    """Serve the metrics of all units and of this process, the supervisor. Gives the bound address.

    `addresses` are those of the units' own metrics, by the units' numbers. Raises OSError for an address that cannot be
    bound.
    """
    with ProcessWatch() as processes:
        processes.watch("supervisor", os.getpid())
        bound, close = serve_metrics(listen, [UnitsMetrics(addresses), processes])
        try:
            yield bound
        finally:
            close()


class UnitsMetrics:
    """The metrics of all units: each series has the label `unit`, and unlatch_unit_up says which units have answered.

    `addresses` are those of the units' /metrics, by the units' numbers: `unix:/path`.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._addresses = addresses

    def collect(self) -> Iterator[Metric]:
        """Read all units and yield their metrics. May be called from any thread, and waits for two seconds at most."""
        up = GaugeMetricFamily("unlatch_unit_up", "Whether the unit answers for its metrics.", labels=("unit",))
        with ThreadPoolExecutor(len(self._addresses)) as pool:
            read = list(pool.map(_read, self._addresses.keys(), self._addresses.values()))
        for unit, families in zip(self._addresses, read, strict=True):
            up.add_metric((unit,), float(families is not None))
            yield from families or ()
        yield up


def _read(unit: str, address: str) -> list[Metric] | None:
    try:
        return _parsed(_fetched(unix_name(address)), unit)
    except (OSError, ValueError) as error:
        log.warning("metrics of unit not read", unit=unit, address=address, message=str(error))
        return None


def _fetched(name: str) -> str:
    """Read the metrics that are served at a Unix socket. Raises OSError, or ValueError for a wrong answer."""
    until = time.monotonic() + _READ_SECONDS
    answer = bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_READ_SECONDS)
        connection.connect(name)
        connection.sendall(_REQUEST)
        while part := connection.recv(1024 * 1024):
            answer += part
            left_seconds = until - time.monotonic()
            if left_seconds <= 0:
                raise TimeoutError("timed out")
            if len(answer) > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES} bytes")
            connection.settimeout(left_seconds)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    if not head.startswith(b"HTTP/1.1 200 ") or length is None:
        raise ValueError(f"no metrics: {bytes(head[:100])!r}")
    if len(body) != int(length[1]):
        raise ValueError(f"the answer ended after {len(body)} of {int(length[1])} bytes")
    return body.decode()


def _parsed(text: str, unit: str) -> list[Metric]:
    """Read prometheus_client's text format (version 0.0.4), and add the label `unit`. Raises ValueError."""
    families: list[Metric] = []
    documentation = ""
    for line in text.split("\n"):
        if head := _HEAD.fullmatch(line):
            kind, name, rest = head.groups()
            if kind == "HELP":
                documentation = _unescaped(rest)
            else:
                family_name = name.removesuffix("_total") if rest == "counter" else name
                families.append(Metric(family_name, documentation, rest))
        elif families and (sample := _SAMPLE.fullmatch(line)):
            name, labels, value = sample.groups()
            named = {label: _unescaped(text) for label, text in _LABEL.findall(labels or "")}
            families[-1].add_sample(name, {**named, "unit": unit}, float(value))
        elif line:
            raise ValueError(f"not a line of metrics: {line[:100]!r}")
    return families


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
