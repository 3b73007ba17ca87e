"""What a test sees of processes from outside: /proc, metrics, and conditions that come true in time."""

import asyncio
import os
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

POLL_SECONDS = 0.005
WITHIN_SECONDS = 10.0


def wait_until(condition: Callable[[], object], what: str, within: float = WITHIN_SECONDS) -> float:
    """Poll until it holds; the seconds that it took. Fails when it does not hold in time."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within, f"not within {within} s: {what}"
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began


async def until(condition: Callable[[], object], what: str, within: float = WITHIN_SECONDS) -> float:
    """The same beside other tasks of an event loop."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within, f"not within {within} s: {what}"
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Process:
    """A process and no other that gets its number later."""

    pid: int
    start: int
    command: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this number now. Raises OSError when there is none."""
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
        return cls(pid, int(_stat(pid)[19]), command)

    @property
    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            fields = _stat(self.pid)
        except OSError:
            return False
        return int(fields[19]) == self.start and fields[0] not in ("Z", "X")


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def children(parent: int, *, zombies: bool = False) -> list[int]:
    """Its children that run; or those that have ended, and that nobody has waited for."""
    found = []
    for pid in _pids():
        try:
            fields = _stat(pid)
        except OSError:
            continue
        if int(fields[1]) == parent and (fields[0] in "ZX") == zombies:
            found.append(pid)
    return sorted(found)


def tree(root: int) -> list[Process]:
    """A process and all that descend from it."""
    found = [Process.of(root)]
    for child in children(root):
        found += tree(child)
    return found


def alive(processes: Iterable[Process]) -> list[Process]:
    """Those that still run."""
    return [process for process in processes if process.alive]


def descriptors(pid: int) -> dict[int, str]:
    """Its open files."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def memory_files(pids: Iterable[int]) -> set[int]:
    """The inodes of the memfds of ours that these processes hold."""
    found = set()
    for pid in pids:
        try:
            for fd, target in descriptors(pid).items():
                if "memfd:unlatch" in target:
                    found.add(os.stat(f"/proc/{pid}/fd/{fd}").st_ino)
        except OSError:
            continue
    return found


def all_memory_files() -> set[int]:
    """The same of every process on this machine."""
    return memory_files(_pids())


def resident_bytes(pid: int) -> int:
    """What of it is in RAM and its own alone."""
    return status_bytes(pid, "RssAnon")


def status_bytes(pid: int, name: str) -> int:
    """One of the sizes in /proc/<pid>/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")


def processor_seconds(pid: int) -> float:
    """Processor time by the process's own clock (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


Labels = frozenset[tuple[str, str]]


class Scrape:
    """One reading of a /metrics."""

    def __init__(self, address: str) -> None:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=WITHIN_SECONDS) as response:
            self.text = response.read().decode()
        self.samples: dict[tuple[str, Labels], float] = {}
        self._counters: set[tuple[str, Labels]] = set()
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                self.samples[key] = sample.value
                if family.type == "counter" or (family.type == "histogram" and not sample.name.endswith("_sum")):
                    self._counters.add(key)

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the series of that name with those labels."""
        wanted = labels.items()
        return sum(value for (found, has), value in self.samples.items() if found == name and wanted <= set(has))

    def labels(self, name: str) -> list[dict[str, str]]:
        """The label sets under which a name is exported, with a value above zero."""
        return [dict(has) for (found, has), value in self.samples.items() if found == name and value]

    def fell_since(self, earlier: "Scrape") -> list[str]:
        """Counters that have gone backwards, or away."""
        return [
            f"{name}{dict(labels)}: {earlier.samples[name, labels]} -> {self.samples.get((name, labels))}"
            for name, labels in sorted(earlier._counters, key=str)
            if self.samples.get((name, labels), -1.0) < earlier.samples[name, labels]
        ]


class Gate:
    """A named pipe at which a kernel waits. Tests see that it has come, and let it pass."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = -1

    def __str__(self) -> str:
        return str(self.path)

    @property
    def reached(self) -> bool:
        """Whether a kernel waits."""
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return False
        return True

    @property
    def pid(self) -> int:
        """Of the worker that waits."""
        return int(Path(f"{self.path}.pid").read_text())

    def open(self) -> None:
        """Let it pass."""
        assert self.reached
        os.close(self._fd)
        self._fd = -1
