"""Processes that the bench starts, measures from outside, and ends by pid.

CPU time is the scheduler's nanosecond count for each process (a per-process POSIX clock). It is measured in the same
way for all subjects, and does not depend on what they report.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"
PYTHON = sys.executable
STOP_SECONDS = 8.0


class BenchError(Exception):
    """An error that stops the bench; the message tells the user why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A process of a tree, as read from /proc."""

    pid: int
    parent: int
    command: str


class Process:
    """A child in a process group of its own, so that Ctrl-C reaches the bench first. The child ends with the bench.

    Callers, servers and workers share one session, in which niceness has an effect. Between sessions the system divides
    cores whatever runs there, and callers were seen to wait 60 ms while a worker had their core (docs/decisions/0007).
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        cpus: Iterable[int] | None = None,
        piped: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = OUT / "log" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        pinned = ["taskset", "--cpu-list", ",".join(map(str, cpus))] if cpus is not None else []
        pipe = subprocess.PIPE if piped else subprocess.DEVNULL
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *pinned, *argv],
                stdin=pipe,
                stdout=pipe if piped else log,
                stderr=log,
                cwd=ROOT,
                env={**environment(), **(variables or {})},
                process_group=0,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.child.pid

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def stop(self) -> None:
        """Send SIGTERM to the root, then SIGKILL to all of its tree that is left."""
        before = tree(self.pid)
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()
        deadline = time.monotonic() + 2.0
        while (left := [seen for seen in before if _command(seen.pid) == seen.command]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for seen in left:
            if seen.command:
                kill(seen.pid)


class Child(Process):
    """A Python child that answers JSON lines: one answer to each question."""

    def __init__(self, name: str, module: str, *args: str, cpus: Iterable[int] | None = None) -> None:
        super().__init__(name, [PYTHON, "-m", module, *args], cpus=cpus, piped=True)

    def ask(self, **question: Any) -> dict[str, Any]:
        self.tell(**question)
        return self.answer()

    def tell(self, **question: Any) -> None:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(question).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"{self.name} has ended:\n{self.tail()}") from None

    def answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended without an answer:\n{self.tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def environment() -> dict[str, str]:
    """The environment for every subject: this process's own, with one BLAS thread and the repository importable."""
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **one_thread, "PYTHONPATH": str(ROOT)}


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def load_core() -> int:
    """The core to which every load generator is pinned."""
    return cores()[-1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def tree(root: int) -> list[Seen]:
    """`root` and all of its descendants."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))) is not None:
            children[parent].append(int(entry.name))
    found: list[Seen] = []
    waiting = [(root, 0)]
    while waiting:
        pid, parent = waiting.pop()
        if command := _command(pid):
            found.append(Seen(pid=pid, parent=parent, command=command))
            waiting += [(child, pid) for child in children[pid]]
    return found


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """CPU seconds of each process (all threads), to the nanosecond; processes that have ended are left out."""
    seconds: dict[int, float] = {}
    for pid in pids:
        try:
            # As computed by the kernel's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED).
            seconds[pid] = time.clock_gettime((~pid << 3) | 2)
        except OSError:
            continue
    return seconds


def labelled_cpu(root: int) -> dict[str, float]:
    """CPU seconds so far of the tree under `root`, by kind of process; workers are summed."""
    processes = tree(root)
    labels = label(processes)
    total: defaultdict[str, float] = defaultdict(float)
    for pid, seconds in cpu_seconds(seen.pid for seen in processes).items():
        total[labels[pid]] += seconds
    return dict(total)


def zombies(root: int) -> list[int]:
    """Processes of the tree under `root` that have ended but were not reaped."""
    parents = {seen.pid for seen in tree(root)}
    seen = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return [pid for pid, fields in seen.items() if fields and fields[0] == "Z" and int(fields[1]) in parents]


def with_variable(name: str, value: str) -> list[int]:
    """All processes that were started with this environment variable, and their forks."""
    entry = f"{name}={value}".encode()
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and entry in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def workers(root: int) -> list[int]:
    """The workers in the tree under `root`."""
    return [pid for pid, name in label(tree(root)).items() if name == "workers"]


def rss_anon_bytes(pid: int) -> int:
    """Bytes in memory that belong to this process alone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def descriptors(pid: int) -> int:
    """How many file descriptors a process has open: its segments of shared memory are among them."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def threads(pid: int) -> int:
    """How many threads a process has, without those of gRPC's pool, whose number follows the load."""
    return sum(1 for task in Path(f"/proc/{pid}/task").iterdir() if _thread_name(task) not in {"", "event_engine"})


def _thread_name(task: Path) -> str:
    """The name of a thread, by its folder in /proc; "" once the thread has ended."""
    try:
        return (task / "comm").read_text().strip()
    except OSError:
        return ""


def label(processes: Sequence[Seen]) -> dict[int, str]:
    """The kind of each process, by command line and parent. Forked workers keep their forkserver's command line."""
    by_pid = {seen.pid: seen for seen in processes}
    return {seen.pid: _label(seen, by_pid) for seen in processes}


def _label(seen: Seen, by_pid: Mapping[int, Seen]) -> str:
    parent = by_pid.get(seen.parent)
    if "resource_tracker" in seen.command:
        return "resource_tracker"
    if "forkserver" in seen.command:
        return "workers" if parent is not None and "forkserver" in parent.command else "forkserver"
    if parent is not None and "forkserver" in parent.command:
        return "workers"
    if parent is None:
        return "supervisor" if "unlatch" in seen.command and " serve" in seen.command else "server"
    for word, name in (("unlatch.unit", "unit"), ("gateway", "gateway"), ("compute", "dispatcher")):
        if word in seen.command:
            return name
    return "other"


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/pid/stat from the state on; none once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
