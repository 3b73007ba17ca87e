"""The board of processes against the system's own accounting: what /proc says meanwhile of the very same processes."""

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

from tests.deploy.boards import boards, fill
from tests.deploy.prometheus import Series, Watched
from tests.faults.watching import children, status_bytes, wait_until
from unlatch import BlockingClient

pytestmark = pytest.mark.timeout(180)

BOARD = next(board for board in boards() if board.uid == "unlatch-processes")
HEAT, UTILISATION, MEMORY = 11, 12, 51
WINDOW_SECONDS = 4.0
# A scrape's time is when it began. On a busy machine what it tells is read up to 0.1 s later, which may be as much
# processor time; over the window it is a fortieth, and as much comes of what `rate` assumes of the window's edges.
WITHIN_CPU_SECONDS, WITHIN_RATIO = 0.15, 0.1
# What a process has in RAM may grow between the two.
WITHIN_BYTES = 4 * 1024 * 1024
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_SECONDS


class Readings:
    """What /proc says of some processes every 20 ms, as long as a `with` block lasts."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._at: list[float] = []
        self._used: dict[int, list[float]] = {pid: [] for pid in pids}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read, name="readings", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def used(self, pid: int, since: float, until: float) -> float:
        """Processor seconds between two moments."""
        begin, end = np.interp([since, until], self._at, self._used[pid])
        return float(end - begin)

    def _read(self) -> None:
        while not self._ends.wait(0.02):
            self._at.append(time.time())
            for pid, used in self._used.items():
                used.append(processor_seconds(pid))


@contextmanager
def calling(call: Callable[[], object]) -> Iterator[None]:
    """One caller, who calls again as soon as it is answered."""
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
    """A mesh's processes over a stretch of time: what /proc has said, until when, and what was resident then.

    `pids` are by pod and process; Prometheus tells a pod's workers by slot, so here they are by their number of birth.
    """

    watched: Watched
    pids: Mapping[tuple[str, str], int]
    readings: Readings
    moment: float
    resident: Mapping[int, int]

    def panel(self, number: int) -> list[Series]:
        """What a panel of the board shows at that moment."""
        values = {**BOARD.everything(), "__rate_interval": f"{WINDOW_SECONDS:g}s"}
        (asked,) = [asked.expr for asked in BOARD.asks() if asked.number == number]
        return self.watched.prometheus.query(fill(asked, values), at=self.moment)


@pytest.fixture(scope="module")
def compared(watched: Watched) -> Compared:
    """Two long calls at any time, and many small ones, for as long as the panels look back."""
    door, prometheus = watched.door, watched.prometheus
    # Runs of the load that nobody waited for are over, and who was killed of it is replaced.
    rest = "min(unlatch_worker_up) == 1 unless on () count(unlatch_worker_running_seconds)"
    wait_until(lambda: prometheus.query(rest), "every worker rests", 60.0)
    pids = {("unlatch-gateway-0", "gateway"): watched.gateway.pid}
    for number, front in enumerate(watched.fronts):
        pod = f"unlatch-compute-{number}"
        (forkserver,) = [child for child in children(front.pid) if children(child)]
        pids |= {(pod, "front"): front.pid, (pod, "forkserver"): forkserver}
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
        resident: dict[int, int] = {}

        def passed() -> bool:
            if not resident and time.time() >= moment:
                resident.update({pid: status_bytes(pid, "VmRSS") for pid in pids.values()})
            return bool(prometheus.query(f"min(timestamp(up)) > {moment + 0.5}"))

        wait_until(passed, "the window was scraped", 60.0)
    return Compared(watched=watched, pids=pids, readings=readings, moment=moment, resident=resident)


def by_process(given: Sequence[Series]) -> dict[tuple[str, str], float]:
    return {(one.labels["pod"], one.labels["process"]): one.value for one in given}


def test_utilisation_is_that_of_proc(compared: Compared) -> None:
    """Of each process the lines and the heat map show processor time over wall time within 0.1 of /proc's."""
    since = compared.moment - WINDOW_SECONDS
    expected = {
        name: compared.readings.used(pid, since, compared.moment) / WINDOW_SECONDS
        for name, pid in compared.pids.items()
    }
    for panel in (UTILISATION, HEAT):
        shown = by_process(compared.panel(panel))
        assert matched(shown) == pytest.approx(matched(expected), abs=WITHIN_RATIO)
    # On a machine that has both cores to spare it is 0.8 and more.
    assert max(expected.values()) > 0.1, "no worker was busy"


def test_processor_time_is_that_of_proc(compared: Compared) -> None:
    """From scrape to scrape each process's counter grows as /proc's does, within 0.15 s of the whole window."""
    grown: dict[tuple[str, str], float] = {}
    expected: dict[tuple[str, str], float] = {}
    for one in compared.watched.prometheus.query(
        f"unlatch_process_cpu_seconds_total[{WINDOW_SECONDS:g}s]", at=compared.moment
    ):
        name = one.labels["pod"], one.labels["process"]
        (since, first), (until, last) = one.points[0], one.points[-1]
        grown[name] = grown.get(name, 0.0) + last - first
        expected[name] = compared.readings.used(compared.pids[name], since, until)
    assert matched(grown) == pytest.approx(matched(expected), abs=WITHIN_CPU_SECONDS)


def test_memory_is_that_of_proc(compared: Compared) -> None:
    """What each process has in RAM is /proc's VmRSS within 4 MiB."""
    expected = {name: float(compared.resident[pid]) for name, pid in compared.pids.items()}
    assert matched(by_process(compared.panel(MEMORY))) == pytest.approx(matched(expected), abs=WITHIN_BYTES)


def matched(values: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """By name, workers by their rank in their pod: slots are not told by pids."""
    named = {f"{pod} {process}": value for (pod, process), value in values.items() if "worker" not in process}
    for pod in {pod for pod, _ in values}:
        of_pod = [value for (name, process), value in values.items() if name == pod and "worker" in process]
        named |= {f"{pod} {rank}": value for rank, value in enumerate(sorted(of_pod, reverse=True))}
    return named
