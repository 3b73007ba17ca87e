"""What each process costs, as the system accounts it: processor time, waits for a core, utilisation, memory, faults.

A process is known by a name that outlives it ("dispatcher", "worker-0"), so that counters go on where a replacement
takes over. Each has a *life* here from the moment it is watched until its counters are closed:

    watch(name, pid) -> read every half second and at each scrape -> gone -> settled: added to its name's past

Every reading goes through one file of `/proc/<pid>/stat` that stays open. It stands for that very process: once the
process has been reaped a read fails, whoever has its number by then.

**What a worker burned after its last reading.** A killed worker takes up to half a second of processor time with it
that nobody read. Workers are children of the forkserver, the *reaper*, so no other process may wait for them and learn
their usage. But the system adds a child's whole usage to the reaper's "waited for" counts just before the child's entry
disappears. So when workers have gone, what the reaper's counts gained is theirs: all of it, if one has gone; if several
went between two readings, each has what was last read of it, and what remains is divided by how busy each was. For that
the gain must be known to belong to those workers and no others, which is why `_survey` reads the reaper between two
looks at its children and leaves the accounts open when one is just on its way out. A process that is no child of the
reaper, or whose reaper has itself gone, keeps its last reading.

Counters of a worker include the children that it waited for, since the reaper's do; others' counters do not, or the
front's would hold its workers' a second time.

**How long it waited for a core** is told of each thread by itself (`schedstat`), and what is summed over threads goes
down when one ends. So it is the first thread's: the one that runs the loop, or the kernels. What a killed process
waited after its last reading, half a second at most, is lost.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

SAMPLE_SECONDS = 0.5
WINDOW_SECONDS = 5.0
# A utilisation over less time than this would be noise: a window that has just begun counts as one this long.
_SHORTEST_WINDOW_SECONDS = 0.25
# A child that has ended is reaped within a millisecond; if not, its accounts are looked at again this soon.
_UNSETTLED_SECONDS = 0.01
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_TICK_NANOSECONDS = int(_TICK_SECONDS * 1e9)
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
# A system without scheduler statistics tells of no waits.
_TELLS_WAITS = Path("/proc/self/schedstat").exists()

# User and system time in ticks, minor and major page faults. Whole numbers: sums of fractions depend on their order,
# and a counter that goes down by the last bit has been reset, as Prometheus sees it.
Usage = tuple[int, int, int, int]
_NOTHING: Usage = (0, 0, 0, 0)


class _Life:
    """One process under a name. `gone` when it has been reaped, `leaving` between its end and that."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.parent: int | None = None  # never known of one that had gone before it was watched
        self.reaper: _Life | None = None  # who tells of its usage once it has gone, if anyone does
        self.gone = self.leaving = False
        self.own = self.waited = _NOTHING
        self.core_wait_nanoseconds = 0
        self.resident_bytes = 0
        self._seen: deque[tuple[int, int]] = deque()  # nanoseconds of the wall clock and of the processor
        self._stat = _open(f"/proc/{pid}/stat")
        self._schedstat = _open(f"/proc/{pid}/schedstat") if _TELLS_WAITS else -1
        self.read(0.0)

    def read(self, window_seconds: float) -> None:
        """Read all that the system says now, and forget what it said before the window."""
        try:
            clock = _processor_nanoseconds(self.pid)
            now = time.monotonic_ns()
            # After the clock, which goes by the number: that this succeeds says that the clock was this process's.
            stat = os.pread(self._stat, 4096, 0)
            if _TELLS_WAITS:
                self.core_wait_nanoseconds = int(os.pread(self._schedstat, 128, 0).split()[1])
        except OSError:
            self._end()
            return
        # Fields as proc_pid_stat(5) numbers them, less 3: the second is a name that may hold anything, ")" included.
        fields = stat[stat.rindex(b")") + 2 :].split()
        self.leaving = fields[0] in b"ZX"
        self.parent = int(fields[1]) if self.parent is None else self.parent
        self.own = (int(fields[11]), int(fields[12]), int(fields[7]), int(fields[9]))
        self.waited = (int(fields[13]), int(fields[14]), int(fields[8]), int(fields[10]))
        self.resident_bytes = int(fields[21]) * _PAGE_BYTES
        self._seen.append((now, clock if clock is not None else (self.own[0] + self.own[1]) * _TICK_NANOSECONDS))
        while len(self._seen) > 2 and now - self._seen[1][0] >= window_seconds * 1e9:
            self._seen.popleft()

    @property
    def usage(self) -> Usage:
        """What it has used; with the children that it waited for, where its reaper's counts will have them too."""
        return self.own if self.reaper is None else _sum(self.own, self.waited)

    def utilization(self) -> float:
        """Processor time over wall time between the oldest and the newest reading of the window."""
        if not self._seen:
            return 0.0
        (wall, processor), (wall_now, processor_now) = self._seen[0], self._seen[-1]
        # A process that has just ended has ticks only, which may lie a little behind its clock.
        return max(0, processor_now - processor) / max(wall_now - wall, _SHORTEST_WINDOW_SECONDS * 1e9)

    def _end(self) -> None:
        self.gone, self.leaving, self.resident_bytes = True, False, 0
        for opened in (self._stat, self._schedstat):
            if opened >= 0:
                os.close(opened)
        self._stat = self._schedstat = -1


class _Name:
    """What is exported under a name: the past of its processes that have gone, and those that are not yet settled."""

    def __init__(self) -> None:
        self.past = _NOTHING
        self.past_wait_nanoseconds = 0
        self.lives: list[_Life] = []  # the last is the one that fills the name now


class ProcessWatch:
    """Watches processes from a thread of its own between `start` and `close`; a prometheus_client collector of them.

    `reaper` is the name under which the forkserver will be watched, if there is one: watch it before its children.
    """

    def __init__(
        self, *, reaper: str = "", sample_seconds: float = SAMPLE_SECONDS, window_seconds: float = WINDOW_SECONDS
    ) -> None:
        self._reaper_name = reaper
        self._sample_seconds = sample_seconds
        self._window_seconds = window_seconds
        self._names: dict[str, _Name] = {}
        self._reaper: _Life | None = None
        self._accounted = _NOTHING  # what of the reaper's waited-for counts has been given to a name
        # Scrapes and the sampling thread take turns; the event loop never waits for them, it leaves its news here.
        self._turn = threading.Lock()
        self._news: deque[tuple[str, _Life]] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="process-watch", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def close(self) -> None:
        """Stop sampling. What was counted can still be collected."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def watch(self, name: str, pid: int) -> None:
        """From now on `name` is this process. One that filled it before is still accounted for, to its end.

        Takes about 0.1 ms and waits for nobody. A process that has ended already counts with what its reaper knows.
        """
        self._news.append((name, _Life(pid)))
        self._wake.set()

    def settle(self) -> None:
        """Account for processes that ended just now, instead of within half a second. Never blocks.

        Nothing is lost without it. But of workers that die between two readings only the sum is known for sure, so
        whoever learns of an end says so here.
        """
        self._wake.set()

    def collect(self) -> Iterator[Metric]:
        """Read every process and say what it has cost; safe from any thread."""
        time_used = CounterMetricFamily(
            "unlatch_process_cpu_seconds_total",
            "Processor time used by the processes of this name, those that have ended included.",
            labels=("process", "mode"),
        )
        utilization = GaugeMetricFamily(
            "unlatch_process_utilization_ratio",
            f"Processor time over wall time in the last {self._window_seconds:g} s: 1 is one core.",
            labels=("process",),
        )
        resident = GaugeMetricFamily(
            "unlatch_process_resident_memory_bytes",
            "Memory that the process has in RAM, shared arenas included.",
            labels=("process",),
        )
        faults = CounterMetricFamily(
            "unlatch_process_page_faults_total",
            "Pages that had to be found (minor) or read from a disk (major) when they were touched.",
            labels=("process", "kind"),
        )
        core_wait = CounterMetricFamily(
            "unlatch_process_core_wait_seconds_total",
            "How long the first threads of the processes of this name, ready to run, waited for a core.",
            labels=("process",),
        )
        with self._turn:
            self._sample()
            for label, name in self._names.items():
                user, system, minor, major = name.past
                for life in name.lives:
                    user, system, minor, major = _sum((user, system, minor, major), life.usage)
                now = name.lives[-1] if name.lives and not name.lives[-1].gone else None
                time_used.add_metric((label, "user"), user * _TICK_SECONDS)
                time_used.add_metric((label, "system"), system * _TICK_SECONDS)
                utilization.add_metric((label,), now.utilization() if now else 0.0)
                resident.add_metric((label,), now.resident_bytes if now else 0.0)
                faults.add_metric((label, "minor"), minor)
                faults.add_metric((label, "major"), major)
                waited = name.past_wait_nanoseconds + sum(life.core_wait_nanoseconds for life in name.lives)
                core_wait.add_metric((label,), waited / 1e9)
        yield from (time_used, utilization, resident, faults, *([core_wait] if _TELLS_WAITS else []))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            with self._turn:
                settled = self._sample()
            self._wake.wait(self._sample_seconds if settled else _UNSETTLED_SECONDS)

    def _sample(self) -> bool:
        """Read everything; False when a process is just ending and must be looked at again."""
        while self._news:
            self._welcome(*self._news.popleft())
        # A process seen to be gone for the first time is settled by a second survey, which begins with knowing it.
        return self._survey() or self._survey()

    def _welcome(self, label: str, life: _Life) -> None:
        self._names.setdefault(label, _Name()).lives.append(life)
        if label == self._reaper_name:
            self._reaper, self._accounted = life, life.waited
        elif self._reaper is not None and life.parent in (None, self._reaper.pid):
            life.reaper = self._reaper

    def _survey(self) -> bool:
        """Read every process and close the accounts of those that have gone. False if some must stay open for now.

        Whoever was gone before the reaper is read is in its counts. Whoever is alive after that is not. When there is
        nobody between, the counts' gain belongs to those who were gone, and to children that nobody watches.
        """
        lives = [(name, life) for name in self._names.values() for life in name.lives]
        gone = [(name, life) for name, life in lives if life.gone]
        if self._reaper is not None and not self._reaper.gone:
            self._reaper.read(self._window_seconds)
        between = False
        for _, life in lives:
            if not life.gone and life is not self._reaper:
                life.read(self._window_seconds)
                # An orphan's end is for others to see to, and may take them long.
                between |= life.gone or (life.leaving and life.reaper is not None and life.reaper is self._reaper)
        if between:
            return False
        self._settle(gone)
        return True

    def _settle(self, gone: list[tuple[_Name, _Life]]) -> None:
        reaped: list[_Life] = []
        rest = _NOTHING
        if self._reaper is not None and not self._reaper.gone:
            reaped = [life for _, life in gone if life.reaper is self._reaper]
            rest = _difference(self._reaper.waited, self._accounted)
            self._accounted = self._reaper.waited
        for life in reaped:
            rest = _difference(rest, life.usage)
        # Ticks are cut off, not rounded, so the last readings may exceed the gain by one: no counter takes that back.
        rest = (max(rest[0], 0), max(rest[1], 0), max(rest[2], 0), max(rest[3], 0))
        weights = {life: max(life.utilization(), 0.01) for life in reaped}
        for name, life in gone:
            share = _NOTHING
            if life in weights:
                share = _share(rest, weights[life] / sum(weights.values()))
                rest = _difference(rest, share)
                del weights[life]
            name.past = _sum(name.past, _sum(life.usage, share))
            name.past_wait_nanoseconds += life.core_wait_nanoseconds
            name.lives.remove(life)


def _open(path: str) -> int:
    """A descriptor to read from, -1 where there is nothing."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return -1


def _processor_nanoseconds(pid: int) -> int | None:
    """A process's own clock (clock_getcpuclockid(3)), finer than ticks; None where the system does not show it."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def _sum(a: Usage, b: Usage) -> Usage:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def _difference(a: Usage, b: Usage) -> Usage:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]


def _share(usage: Usage, ratio: float) -> Usage:
    return round(usage[0] * ratio), round(usage[1] * ratio), round(usage[2] * ratio), round(usage[3] * ratio)
