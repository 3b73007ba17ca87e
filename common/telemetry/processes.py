"""Costs of each process, as the system accounts them: processor time, waits for a core, utilisation, memory, faults.

A process is known by a name that outlives it ("dispatcher", "worker-0"), so that counters go on when a replacement
takes over. Each process has a *life* here, from the moment when it is watched until its counters are closed:

    watch(name, pid) -> read every half second and at each scrape -> gone -> settled: added to its name's past

Every reading uses one open file, `/proc/<pid>/stat`. The file belongs to that very process: once the process has been
reaped, reading fails, even if another process has its number by then.

**Processor time of a worker after its last reading.** Up to half a second of a killed worker's processor time was not
read before its death. Workers are children of the forkserver, the *reaper*, so no other process can wait for them and
learn their usage. But the system adds a child's whole usage to the reaper's "waited for" counts just before the child's
entry disappears. So when workers have gone, the gain of the reaper's counts is theirs. If one worker has gone, it gets
all of the gain. If several went between two readings, each gets what was last read of it, and the rest is divided by
how busy each was. For that the gain must be known to belong to those workers only. This is why `_survey` reads the
reaper between two looks at its children, and leaves the accounts open while a child is just ending. A process that is
no child of the reaper, or whose reaper has gone, keeps its last reading.

Counters of a worker include the children that it waited for, since the reaper's counts do. Counters of other processes
do not, because the dispatcher's would then count its workers twice.

**Waits for a core** are reported for each thread (`schedstat`), and a sum over threads would fall when one ends. So
only the first thread's waits count: the thread that runs the loop, or the kernels. Waits of a killed process after its
last reading, half a second at most, are lost.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

SAMPLE_SECONDS = 0.5
WINDOW_SECONDS = 5.0
# Over a shorter time utilisation would be noise, so a window that has just begun counts as this long.
_SHORTEST_WINDOW_SECONDS = 0.25
# A child that has ended is reaped within a millisecond; if it is not, its accounts are read again after this time.
_UNSETTLED_SECONDS = 0.01
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_TICK_NANOSECONDS = int(_TICK_SECONDS * 1e9)
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
# False on a system without scheduler statistics, which reports no waits.
_TELLS_WAITS = Path("/proc/self/schedstat").exists()

# User and system time in ticks, minor and major page faults. All are integers: sums of fractions depend on their order,
# and Prometheus takes a counter that falls by the last bit for a reset.
Usage = tuple[int, int, int, int]
_NOTHING: Usage = (0, 0, 0, 0)


class _Life:
    """A process under a name. `gone` means reaped; `leaving` means ended but not yet reaped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.parent: int | None = None  # unknown for a process that was gone before it was watched
        self.reaper: _Life | None = None  # the process whose counts get this one's usage, if there is one
        self.gone = self.leaving = False
        self.own = self.waited = _NOTHING
        self.core_wait_nanoseconds = 0
        self.resident_bytes = 0
        self._seen: deque[tuple[int, int]] = deque()  # nanoseconds of the wall clock and of the processor
        self._stat = _open(f"/proc/{pid}/stat")
        self._schedstat = _open(f"/proc/{pid}/schedstat") if _TELLS_WAITS else -1
        self.read(0.0)

    def read(self, window_seconds: float) -> None:
        """Read all present figures, and drop those from before the window."""
        try:
            clock = _processor_nanoseconds(self.pid)
            now = time.monotonic_ns()
            # After the clock, which is read by pid: if this read succeeds, the clock was this process's.
            stat = os.pread(self._stat, 4096, 0)
            if _TELLS_WAITS:
                self.core_wait_nanoseconds = int(os.pread(self._schedstat, 128, 0).split()[1])
        except OSError:
            self._end()
            return
        # Numbered as in proc_pid_stat(5), less 3: the second field is a name with any characters, even ")".
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
        """Usage of the process, plus that of children it waited for if its reaper's counts will include them."""
        return self.own if self.reaper is None else _sum(self.own, self.waited)

    def utilization(self) -> float:
        """Processor time over wall time, between the oldest and newest reading of the window."""
        if not self._seen:
            return 0.0
        (wall, processor), (wall_now, processor_now) = self._seen[0], self._seen[-1]
        # A process that has just ended has only ticks, which may lie a little behind its clock.
        return max(0, processor_now - processor) / max(wall_now - wall, _SHORTEST_WINDOW_SECONDS * 1e9)

    def _end(self) -> None:
        self.gone, self.leaving, self.resident_bytes = True, False, 0
        for opened in (self._stat, self._schedstat):
            if opened >= 0:
                os.close(opened)
        self._stat = self._schedstat = -1

    def __del__(self) -> None:
        # Of a watch that is dropped.
        self._end()


class _Name:
    """The accounts of one name: the past of settled processes, and the processes that are not settled yet."""

    def __init__(self) -> None:
        self.past = _NOTHING
        self.past_wait_nanoseconds = 0
        self.lives: list[_Life] = []  # the last one has the name now


class ProcessWatch:
    """Watches processes in a thread of its own between `start` and `close`. It is a collector for prometheus_client.

    `reaper` is the name of the forkserver, if there is one; watch the forkserver before its children.
    """

    def __init__(
        self, *, reaper: str = "", sample_seconds: float = SAMPLE_SECONDS, window_seconds: float = WINDOW_SECONDS
    ) -> None:
        self._reaper_name = reaper
        self._sample_seconds = sample_seconds
        self._window_seconds = window_seconds
        self._names: dict[str, _Name] = {}
        self._reaper: _Life | None = None
        self._accounted = _NOTHING  # the part of the reaper's waited-for counts that names have been given
        # Held by scrapes and by the sampling thread. The event loop never waits for it; it only adds to `_news`.
        self._turn = threading.Lock()
        self._news: deque[tuple[str, _Life]] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="process-watch", daemon=True)

    def start(self) -> None:
        """Start the sampling thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop sampling. Counted figures can still be collected."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def watch(self, name: str, pid: int) -> None:
        """Assign a process to `name`. The process that had the name before is accounted for until its end.

        Takes about 0.1 ms and never blocks. A process that has ended already gets what its reaper knows.
        """
        self._news.append((name, _Life(pid)))
        self._wake.set()

    def settle(self) -> None:
        """Account for processes that ended just now, rather than within half a second. Never blocks.

        Nothing is lost without this call. But of workers that die between two readings only the sum is known exactly,
        so call it whenever a worker ends.
        """
        self._wake.set()

    def collect(self) -> Iterator[Metric]:
        """Read every process and yield its costs. May be called from any thread."""
        time_used = CounterMetricFamily(
            "unlatch_process_cpu_seconds_total",
            "Processor time used by the processes of this name, ended ones included.",
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
            "Pages that were found in memory (minor) or read from a disk (major) when they were touched.",
            labels=("process", "kind"),
        )
        core_wait = CounterMetricFamily(
            "unlatch_process_core_wait_seconds_total",
            "Seconds that the first threads of the processes of this name were ready to run and waited for a core.",
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            with self._turn:
                settled = self._sample()
            self._wake.wait(self._sample_seconds if settled else _UNSETTLED_SECONDS)

    def _sample(self) -> bool:
        """Read all processes. Returns False if one is just ending and must be read again."""
        while self._news:
            self._welcome(*self._news.popleft())
        # A process found to be gone is settled by a second survey, which knows that from its beginning.
        return self._survey() or self._survey()

    def _welcome(self, label: str, life: _Life) -> None:
        self._names.setdefault(label, _Name()).lives.append(life)
        if label == self._reaper_name:
            self._reaper, self._accounted = life, life.waited
        elif self._reaper is not None and life.parent in (None, self._reaper.pid):
            life.reaper = self._reaper

    def _survey(self) -> bool:
        """Read every process and close the accounts of those that have gone. Returns False if some must stay open.

        A process that was gone before the reaper is read is in the reaper's counts. A process that is alive after that
        is not. If no process went in between, the counts' gain belongs to the gone processes, and to children that are
        not watched.
        """
        lives = [(name, life) for name in self._names.values() for life in name.lives]
        gone = [(name, life) for name, life in lives if life.gone]
        if self._reaper is not None and not self._reaper.gone:
            self._reaper.read(self._window_seconds)
        going = [self._goes(life) for _, life in lives if not life.gone and life is not self._reaper]
        if any(going):
            return False
        self._settle(gone)
        return True

    def _goes(self, life: _Life) -> bool:
        """Read a process. Returns whether it has just gone, or is about to."""
        life.read(self._window_seconds)
        # The end of an orphan is left to other processes, and may take them long.
        return life.gone or (life.leaving and life.reaper is not None and life.reaper is self._reaper)

    def _settle(self, gone: list[tuple[_Name, _Life]]) -> None:
        reaped: list[_Life] = []
        rest = _NOTHING
        if self._reaper is not None and not self._reaper.gone:
            reaped = [life for _, life in gone if life.reaper is self._reaper]
            rest = _difference(self._reaper.waited, self._accounted)
            self._accounted = self._reaper.waited
        for life in reaped:
            rest = _difference(rest, life.usage)
        # Ticks are truncated, so the last readings may exceed the gain by one; counters must not fall for that.
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
    """Open a file for reading; -1 if there is none."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return -1


def _processor_nanoseconds(pid: int) -> int | None:
    """A process's own clock (clock_getcpuclockid(3)), finer than ticks; None if the system does not provide it."""
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
