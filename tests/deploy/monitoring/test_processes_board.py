"""The board of processes against the system's own accounts: the same processes, read from /proc at the same time."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from tests.deploy.monitoring.boards import boards, fill
from tests.deploy.monitoring.prometheus import Series, Watched
from tests.support.watching import children, wait_until
from unlatch import BlockingClient

pytestmark = pytest.mark.timeout(180)

BOARD = next(board for board in boards() if board.uid == "unlatch-processes")
HEAT, UTILISATION, IN_A_RUN, MEMORY = 11, 12, 23, 51
# The services that run apart; units that rest are not compared.
PODS = "unlatch-(gateway|compute)-.*"
APART = f'pod=~"{PODS}"'
WINDOW_SECONDS = 4.0
# A scrape's time is when it began. On a busy machine its values are read up to 0.1 s later, which may be as much
# processor time. Over the window that is a fortieth, and `rate` adds as much by its assumptions at the window's edges.
WITHIN_CPU_SECONDS, WITHIN_RATIO = 0.15, 0.1
# A process's memory may change between two readings.
WITHIN_BYTES = 4 * 1024 * 1024
# On a busy and slow machine a scrape sometimes takes longer than its half second, and fails.
_FAILING_SECONDS = 2.0
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


def used_waited_resident(pid: int) -> tuple[float, float, float]:
    """Read the seconds that all threads of a process were on a core, and that its first waited for one; and its RSS."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    _, waited_nanoseconds, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    used_seconds = (int(fields[11]) + int(fields[12])) * _TICK_SECONDS
    return used_seconds, int(waited_nanoseconds) / 1e9, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


class Readings:
    """Readings of /proc of some processes, every 20 ms inside a `with` block."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._at: list[float] = []
        self._said: dict[int, list[tuple[float, float, float]]] = {pid: [] for pid in pids}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read, name="readings", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def used(self, pid: int, since: float, until: float) -> float:
        """Return the seconds on a core between two moments."""
        return self._between(0, pid, since, until)

    def waited(self, pid: int, since: float, until: float) -> float:
        """Return the seconds of waiting for a core between two moments."""
        return self._between(1, pid, since, until)

    def resident(self, pid: int, since: float, until: float) -> list[float]:
        """Return the bytes in RAM at every reading between two moments."""
        read = zip(self._at, self._said[pid], strict=False)
        return [said[2] for at, said in read if since <= at <= until]

    def _between(self, which: int, pid: int, since: float, until: float) -> float:
        begin, end = np.interp([since, until], self._at, [said[which] for said in self._said[pid]])
        return float(end - begin)

    def _read(self) -> None:
        while not self._ends.wait(0.02):
            self._at.append(time.time())
            for pid, said in self._said.items():
                said.append(used_waited_resident(pid))


@contextmanager
def calling(call: Callable[[], object]) -> Iterator[None]:
    """A caller that calls again as soon as it is answered."""
    ends = threading.Event()

    def go() -> None:
        while not ends.is_set():
            call()

    thread = threading.Thread(target=go, name="caller", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join(30)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A mesh's processes over a stretch of time: what /proc said, and when it ended.

    `pids` are by pod and process. Prometheus tells a pod's workers by slot, and here they are by order of their start.
    """

    watched: Watched
    pids: Mapping[tuple[str, str], int]
    readings: Readings
    moment: float

    def panel(self, number: int) -> list[Series]:
        """Return a panel of the board at that time. For a pod whose last scrape failed, use the scrape before."""
        values = {**BOARD.everything(), "pod": PODS, "__rate_interval": f"{WINDOW_SECONDS:g}s"}
        (asked,) = [asked.expr for asked in BOARD.asks() if asked.number == number]
        since = self.moment - _FAILING_SECONDS
        return self.watched.prometheus.query_range(fill(asked, values), start=since, end=self.moment, step_seconds=0.5)


@pytest.fixture(scope="module")
def compared(watched: Watched) -> Compared:
    """Two long calls at any time, and many small ones, for as long as the panels look back."""
    door, prometheus = watched.door, watched.prometheus
    # The load's abandoned runs are over, and workers that were killed for them are replaced.
    rest = f"sum(unlatch_worker_up{{{APART}}}) == 4 unless on () count(unlatch_worker_running_seconds)"
    wait_until(lambda: prometheus.query(rest), "every worker rests", 60.0)
    pids = {("unlatch-gateway-0", "gateway"): watched.gateway.pid}
    for number, dispatcher in enumerate(watched.dispatchers):
        pod = f"unlatch-compute-{number}"
        (forkserver,) = [child for child in children(dispatcher.pid) if children(child)]
        pids |= {(pod, "dispatcher"): dispatcher.pid, (pod, "forkserver"): forkserver}
        pids |= {(pod, f"worker-{slot}"): worker for slot, worker in enumerate(children(forkserver))}
    rows = np.random.default_rng(1).random(8)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(BlockingClient(door.target, tls=door.tls, token=lambda: door.issuer.token("planning")))
            for _ in range(3)
        ]
        readings = stack.enter_context(Readings(list(pids.values())))
        stack.enter_context(calling(lambda: clients[0].record(rows, seconds=0.5)))
        stack.enter_context(calling(lambda: clients[1].record(rows, seconds=0.5)))
        stack.enter_context(calling(lambda: clients[2].identity(rows)))
        moment = time.time() + WINDOW_SECONDS + 1.0
        scraped = f"min(timestamp(up)) > {moment + 0.5}"
        wait_until(lambda: prometheus.query(scraped), "the window was scraped", 60.0)
    return Compared(watched=watched, pids=pids, readings=readings, moment=moment)


def by_process(given: Sequence[Series]) -> dict[tuple[str, str], float]:
    return {(one.labels["pod"], one.labels["process"]): one.value for one in given}


def test_utilisation_is_that_of_proc(compared: Compared) -> None:
    """For each process the lines and the heat map show processor time over wall time within 0.1 of /proc's."""
    since, until = compared.moment - WINDOW_SECONDS, compared.moment
    expected = {name: compared.readings.used(pid, since, until) / WINDOW_SECONDS for name, pid in compared.pids.items()}
    for panel in (UTILISATION, HEAT):
        shown = by_process(compared.panel(panel))
        assert matched(shown) == pytest.approx(matched(expected), abs=WITHIN_RATIO)
    # Both with a core and without one.
    assert max(one.value for one in compared.panel(IN_A_RUN)) > 0.5, "no worker was busy"


@pytest.mark.parametrize(
    ("counter", "within_seconds"),
    [
        ("unlatch_process_cpu_seconds_total", WITHIN_CPU_SECONDS),
        # A wait is counted when it is over, and without a core to spare it lasts for tenths of a second.
        ("unlatch_process_core_wait_seconds_total", 0.5),
    ],
)
def test_counters_are_those_of_proc(compared: Compared, counter: str, within_seconds: float) -> None:
    """From scrape to scrape, over the whole window, what each process used or waited grows as in /proc."""
    of_proc = compared.readings.used if "cpu" in counter else compared.readings.waited
    grown: dict[tuple[str, str], float] = {}
    expected: dict[tuple[str, str], float] = {}
    for one in compared.watched.prometheus.query(f"{counter}{{{APART}}}[{WINDOW_SECONDS:g}s]", at=compared.moment):
        name = one.labels["pod"], one.labels["process"]
        (since, first), (until, last) = one.points[0], one.points[-1]
        grown[name] = grown.get(name, 0.0) + last - first
        expected[name] = of_proc(compared.pids[name], since, until)
    assert matched(grown) == pytest.approx(matched(expected), abs=within_seconds)


def test_memory_is_that_of_proc(compared: Compared) -> None:
    """Each process's memory is /proc's within 4 MiB, at a moment since the scrape that the panel shows."""
    since, until = compared.moment - _FAILING_SECONDS, compared.moment
    read = {name: compared.readings.resident(pid, since, until) for name, pid in compared.pids.items()}
    least = matched({name: min(values) for name, values in read.items()})
    most = matched({name: max(values) for name, values in read.items()})
    shown = matched(by_process(compared.panel(MEMORY)))
    assert shown.keys() == least.keys()
    for name, value in shown.items():
        assert least[name] - WITHIN_BYTES <= value <= most[name] + WITHIN_BYTES, name


def matched(values: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Match series and processes by name, and workers by their order in the pod: slots do not have pids."""
    named = {f"{pod} {process}": value for (pod, process), value in values.items() if "worker" not in process}
    for pod in {pod for pod, _ in values}:
        of_pod = [value for (name, process), value in values.items() if name == pod and "worker" in process]
        named |= {f"{pod} {rank}": value for rank, value in enumerate(sorted(of_pod, reverse=True))}
    return named
