"""Processes as tests see them from outside: /proc, metrics, and conditions that become true in time."""

import asyncio
import os
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

POLL_SECONDS = 0.005
WITHIN_SECONDS = 10.0


def wait_until(condition: Callable[[], object], what: str, within: float = WITHIN_SECONDS) -> float:
    """Poll until the condition holds, and return how many seconds that took. Fails when it does not hold in time."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within, f"not within {within} s: {what}"
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began


async def until(condition: Callable[[], object], what: str, within: float = WITHIN_SECONDS) -> float:
    """Poll in the same way beside other tasks of an event loop."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within, f"not within {within} s: {what}"
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from a later one with the same pid."""

    pid: int
    start: int
    command: str

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the process that has this pid now. Raises OSError when there is none."""
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
        return cls(pid, int(_stat(pid)[19]), command)

    @property
    def alive(self) -> bool:
        """Whether the process runs. A zombie does not."""
        try:
            fields = _stat(self.pid)
        except OSError:
            return False
        return int(fields[19]) == self.start and fields[0] not in ("Z", "X")


def command_of(pid: int) -> str:
    """Return the command line of a process; "" if it has ended."""
    try:
        return Process.of(pid).command
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def children(parent: int, *, zombies: bool = False) -> list[int]:
    """Return a process's running children; with `zombies`, those that have ended and were not waited for."""
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
    """Return a process and all its descendants. Those that end meanwhile are left out."""
    found = [Process.of(root)]
    for child in children(root):
        with suppress(OSError):
            found += tree(child)
    return found


def alive(processes: Iterable[Process]) -> list[Process]:
    """Return those processes that still run."""
    return [process for process in processes if process.alive]


def descriptors(pid: int) -> dict[int, str]:
    """Return a process's open files."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def memory_files(pids: Iterable[int]) -> set[int]:
    """Return the inodes of our memfds that these processes hold."""
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
    """Return the inodes of our memfds that any process on this machine holds."""
    return memory_files(_pids())


def resident_bytes(pid: int) -> int:
    """Return the bytes of a process's own memory that are in RAM."""
    return status_bytes(pid, "RssAnon")


def status_bytes(pid: int, name: str) -> int:
    """Read one of the sizes in /proc/<pid>/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")


def processor_seconds(pid: int) -> float:
    """Read processor time from the process's own clock (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


Labels = frozenset[tuple[str, str]]


class Scrape:
    """A scrape of a /metrics address. After a `#` the address may name the component whose series are wanted."""

    def __init__(self, address: str) -> None:
        address, _, component = address.partition("#")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=WITHIN_SECONDS) as response:
            lines = response.read().decode().splitlines(keepends=True)
        self.text = "".join(line for line in lines if not component or _may_be_of(component, line))
        self.samples: dict[tuple[str, Labels], float] = {}
        self._counters: set[tuple[str, Labels]] = set()
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                self.samples[key] = sample.value
                if family.type in ("counter", "histogram"):
                    self._counters.add(key)

    def sum(self, name: str, **labels: str) -> float:
        """Add up the series of that name with those labels."""
        wanted = labels.items()
        return sum(value for (found, has), value in self.samples.items() if found == name and wanted <= set(has))

    def labels(self, name: str) -> list[dict[str, str]]:
        """Return the label sets under which a name is exported with a value above zero."""
        return [dict(has) for (found, has), value in self.samples.items() if found == name and value]

    def fell_since(self, earlier: "Scrape") -> list[str]:
        """Return the counters that have fallen, or are gone, since another scrape."""
        return [
            f"{name}{dict(labels)}: {earlier.samples[name, labels]} -> {self.samples.get((name, labels))}"
            for name, labels in sorted(earlier._counters, key=str)
            if self.samples.get((name, labels), -1.0) < earlier.samples[name, labels]
        ]


def _may_be_of(component: str, line: str) -> bool:
    """Whether a line of /metrics is not of another component's series."""
    return 'component="' not in line or f'component="{component}"' in line


class Gate:
    """A named pipe at which a kernel waits. A test sees that the kernel has come, and lets it go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = -1

    def __str__(self) -> str:
        return str(self.path)

    @property
    def reached(self) -> bool:
        """Whether a kernel waits at the gate."""
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return False
        return True

    @property
    def pid(self) -> int:
        """The pid of the worker that waits."""
        return int(Path(f"{self.path}.pid").read_text())

    def open(self) -> None:
        """Let the kernel go on."""
        assert self.reached
        os.close(self._fd)
        self._fd = -1
