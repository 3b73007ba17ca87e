"""The mesh that the soak calls, as seen from outside: the two services apart, one unit, or several.

Its parts have names: `gateway` and `dispatcher`; or `supervisor` and `unit`; or `supervisor`, `unit 0` and `unit 1`.
"""

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from bench.processes import ROOT, BenchError, descriptors, kill, label, threads, tree, with_variable, workers, zombies
from bench.scrape import Scrape, scrape, total
from bench.subjects import subjects
from bench.subjects.subjects import Subject

WORKERS = 2
ENDED_SECONDS = 30.0
# The services' collector looks for garbage every second where few calls are live.
USED_SECONDS = 4.0
INSIDE = Path(__file__).parent / "inside"
# What only several units have.
_UNIT = "unit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """A running mesh. `units` is 0 for the two services apart. Its processes have their temporary files in `files`.

    The parts tell the memory that they use in `told` (bench/soak/inside/).
    """

    subject: Subject
    units: int
    files: Path
    told: Path

    @classmethod
    def start(cls, stack: ExitStack, units: int) -> Self:
        """Start a mesh, which `stack` ends."""
        files = stack.enter_context(TemporaryDirectory(prefix="bench-soak-"))
        told = stack.enter_context(TemporaryDirectory(prefix="bench-soak-used-"))
        settings = {"TMPDIR": files, "SOAK_USED": told, "PYTHONPATH": f"{ROOT}:{INSIDE}"}
        settings |= {"UNLATCH_UNITS": str(units)} if units else {}
        subject = subjects.start(stack, "unlatch" if units else "apart", workers=WORKERS, log="soak", settings=settings)
        return cls(subject=subject, units=units, files=Path(files), told=Path(told))

    @property
    def services(self) -> list[str]:
        """The names of the parts that serve calls."""
        if self.units < 2:
            return list(self.subject.metrics)
        return [f"{_UNIT} {number}" for number in range(self.units)]

    def pids(self) -> dict[str, int]:
        """The processes of the parts that live now."""
        found = label(tree(self.subject.process.pid))
        if not self.units:
            return {name: pid for pid, name in found.items() if name in ("gateway", "dispatcher")}
        units = [pid for pid, name in found.items() if name == _UNIT]
        numbers = {pid: f" {_number(pid)}" if self.units > 1 else "" for pid in units}
        return {"supervisor": self.subject.process.pid} | {f"{_UNIT}{number}": pid for pid, number in numbers.items()}

    def workers(self) -> list[int]:
        """The workers that live now."""
        return workers(self.subject.process.pid)

    def scrapes(self) -> dict[str, Scrape]:
        """The metrics of each part. A unit that does not answer is left out."""
        seen = {name: scrape(port) for name, port in self.subject.metrics.items()}
        return seen if self.units < 2 else by_unit(seen[_UNIT])

    def held(self) -> dict[str, dict[str, int]]:
        """Counts of what each part has open, and of what all processes have together."""
        counts = {name: {"descriptors": descriptors(pid), "threads": threads(pid)} for name, pid in self.pids().items()}
        processes = [seen.pid for seen in tree(self.subject.process.pid)]
        files = sum(1 for path in entries(self.files) if not path.is_dir())
        # An orphan of a unit that was killed is in no tree.
        own = {*processes, *self._processes()}
        return counts | {"mesh": {"processes": len(own), "segments": len(_segments(own)), "files": files}}

    def used(self) -> dict[tuple[str, int], int]:
        """Bytes that the parts use while no call is left, by name and pid: the least of some seconds.

        Some are freed late: a closed connection's, or those of cycles, which the garbage collector finds. Raises
        BenchError where a part tells nothing.
        """
        until, least = time.monotonic() + USED_SECONDS, dict[tuple[str, int], int]()
        while time.monotonic() < until:
            for name, pid in self.pids().items():
                if (told := self.told / str(pid)).exists():
                    now = int(told.read_text())
                    least[name, pid] = min(now, least.get((name, pid), now))
            time.sleep(0.2)
        if silent := self.pids().keys() - {name for name, _ in least}:
            raise BenchError(f"{', '.join(sorted(silent))}: no memory in use is told")
        return least

    def serves(self, seen: Mapping[str, Scrape]) -> bool:
        """Whether all parts answer and all workers are up."""
        return seen.keys() >= set(self.services) and everywhere(seen, "unlatch_worker_up") == self._workers(seen)

    def _workers(self, seen: Mapping[str, Scrape]) -> int:
        """The number of workers that there should be: the plain ones, and those that have a metric of async workers."""
        return WORKERS + sum(name == "unlatch_worker_calls_in_flight" for part in seen.values() for name, _ in part)

    def left(self, seen: Mapping[str, Scrape]) -> list[str]:
        """List what is not as it should be when no call is left."""
        left = []
        if not self.serves(seen):
            up = everywhere(seen, "unlatch_worker_up")
            left.append(f"{up:.0f} of {self._workers(seen)} workers are up, by the metrics of {', '.join(seen)}")
        if calls := everywhere(seen, "unlatch_calls_in_flight"):
            left.append(f"gateways hold {calls:.0f} calls")
        if calls := everywhere(seen, "unlatch_queue_depth"):
            left.append(f"{calls:.0f} calls wait")
        if any(name == "unlatch_worker_running_seconds" for part in seen.values() for name, _ in part):
            left.append("a worker runs a call")
        if dead := zombies(self.subject.process.pid):
            left.append(f"{len(dead)} processes are zombies")
        return left

    def end(self) -> list[str]:
        """Stop the mesh as an operator does. Returns what is left of it."""
        self.subject.process.child.terminate()
        deadline = time.monotonic() + ENDED_SECONDS
        while (left := self._remains()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in self._processes():
            kill(pid)
        return [f"left after the end: {what}" for what in left]

    def _remains(self) -> list[str]:
        files = [f"the file {path.relative_to(self.files)}" for path in entries(self.files)]
        return [f"process {pid}" for pid in self._processes()] + files

    def _processes(self) -> list[int]:
        return with_variable("TMPDIR", str(self.files))


def entries(directory: Path) -> list[Path]:
    """All that is in a directory and below it now. What is removed meanwhile may be left out (Path.rglob raises)."""
    return [Path(above, name) for above, folders, files in os.walk(directory) for name in (*folders, *files)]


def by_unit(seen: Scrape) -> dict[str, Scrape]:
    """Divide the supervisor's metrics: those of each unit that answers, without the label `unit`, and its own."""
    parts: defaultdict[str, dict[tuple[str, frozenset[tuple[str, str]]], float]] = defaultdict(dict)
    for (name, labels), value in seen.items():
        unit = dict(labels).get(_UNIT)
        if unit is None or name == "unlatch_unit_up":
            parts["supervisor"][name, labels] = value
        else:
            parts[f"{_UNIT} {unit}"][name, labels - {(_UNIT, unit)}] = value
    return dict(parts)


def everywhere(seen: Mapping[str, Scrape], name: str, component: str = "") -> float:
    """The sum of a metric over all parts, or over those series that have a component."""
    if not component:
        return sum(total(part, name) for part in seen.values())
    return sum(
        value
        for part in seen.values()
        for (found, labels), value in part.items()
        if found == name and ("component", component) in labels
    )


def _number(pid: int) -> str:
    """The number of a unit, from the place that its supervisor gave it."""
    told = Path(f"/proc/{pid}/environ").read_bytes().partition(b'UNLATCH_UNIT={"number": ')[2]
    return told.partition(b",")[0].decode()


def _segments(pids: set[int]) -> set[int]:
    """The segments of shared memory that processes have open, by their inodes."""
    found = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if str(path.readlink()).startswith("/memfd:"):
                    found.add(path.stat().st_ino)
            except OSError:
                continue
    return found
