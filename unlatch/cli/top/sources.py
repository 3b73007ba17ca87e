"""The sources of `top`. A thread of its own reads each /metrics, so that one that hangs does not stall the others.

Source (thread)  fetch, parse ──> Seen, replaced whole by one assignment ──> the screen
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.client import BadStatusLine, HTTPException
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

HISTORY_SECONDS = 60.0
# A supervisor of units waits for two seconds for those that do not answer.
_FETCH_SECONDS = 5.0
_MAX_BYTES = 64 * 1024 * 1024
_UTILIZATION = "unlatch_process_utilization_ratio"

Labels = tuple[tuple[str, str], ...]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """A scrape. `at` is the monotonic clock in seconds. Series are keyed by name, then by their sorted labels."""

    at: float
    series: Mapping[str, Mapping[Labels, float]]

    def of(self, name: str) -> Mapping[Labels, float]:
        """All series of this name."""
        return self.series.get(name, {})

    @property
    def silent_units(self) -> list[str]:
        """The numbers of units that are not in this scrape, because they did not answer."""
        return [dict(labels)["unit"] for labels, up in self.of("unlatch_unit_up").items() if not up]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """State of a source. While it cannot be read, `now` is None and `since` (epoch seconds) is the outage's begin."""

    address: str
    now: Reading | None = None
    before: Reading | None = None
    since: float | None = None
    why: str = ""
    # Utilisation over the last minute by the labels of the process, kept during an outage.
    history: Mapping[Labels, tuple[Point, ...]] = field(default_factory=dict)


class Source:
    """A /metrics at host:port. Its thread calls `told` after every attempt."""

    def __init__(self, address: str, interval_seconds: float, told: Callable[[], None]) -> None:
        self.seen = Seen(address=address)
        self._url = f"http://{address}/metrics"
        self._interval_seconds = interval_seconds
        self._told = told
        self._open = build_opener(ProxyHandler({})).open
        self._thread = threading.Thread(target=self._run, name=f"top {address}", daemon=True)

    def start(self) -> None:
        """Start the thread, which ends with the process."""
        self._thread.start()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self.seen = _read(self.seen, self._fetch())
            except (OSError, HTTPException, LookupError, ValueError) as error:
                self.seen = _missed(self.seen, error)
            self._told()
            time.sleep(max(0.0, began + self._interval_seconds - time.monotonic()))

    def _fetch(self) -> Reading:
        with self._open(self._url, timeout=_FETCH_SECONDS) as answer:
            text = answer.read(_MAX_BYTES).decode()
        series: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return Reading(time.monotonic(), series)


def _read(seen: Seen, reading: Reading) -> Seen:
    history = {
        labels: (*_recent(seen, labels, reading.at), (reading.at, value))
        for labels, value in reading.of(_UTILIZATION).items()
    }
    return replace(seen, now=reading, before=seen.now, since=None, why="", history={**seen.history, **history})


def _recent(seen: Seen, process: Labels, now: float) -> tuple[Point, ...]:
    return tuple(point for point in seen.history.get(process, ()) if point[0] > now - HISTORY_SECONDS)


def _missed(seen: Seen, error: Exception) -> Seen:
    reason = error.reason if isinstance(error, URLError) else error
    # gRPC's answer is bytes of HTTP/2, which tell a reader nothing.
    said = "the answer is not HTTP/1" if isinstance(reason, BadStatusLine) else str(reason)
    why = getattr(reason, "strerror", None) or said or type(error).__name__
    # A source that returns may have restarted, so rates are made only from readings without a gap between.
    return replace(seen, now=None, before=None, since=seen.since or time.time(), why=why)
