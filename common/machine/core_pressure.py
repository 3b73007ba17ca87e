"""Pressure on the cores: the share of time in which work that was ready had to wait for a core.

Linux measures it for the whole machine and for each cgroup (PSI, its accounting/psi.rst). A cgroup's includes the time
for which a quota held it back. Where there is none, the waits of this process's first thread stand for it.
"""

from collections.abc import Callable
from pathlib import Path
from time import monotonic

from unlatch.common.machine.cgroups import own_cgroup

_MACHINE = Path("/proc/pressure/cpu")
# Time over which a share is measured at least. It is measured since the reading before, however long ago that was.
_SHORTEST_SECONDS = 0.2


class CorePressure:
    """The pressure on this process's cgroup, and on the whole machine. `clock` is for tests, and so are the files."""

    def __init__(
        self,
        cgroup: Path | None = None,
        machine: Path = _MACHINE,
        waits: Path = Path("/proc/self/schedstat"),
        clock: Callable[[], float] = monotonic,
    ) -> None:
        own = own_cgroup() / "cpu.pressure" if cgroup is None else cgroup
        self._own = _Share(lambda: _stalled_seconds(own), clock)
        self._machine = _Share(lambda: _stalled_seconds(machine), clock)
        self._waits = _Share(lambda: _waited_seconds(waits), clock)

    def share(self, *, whole_machine: bool) -> float:
        """Return the greatest of the shares since the last reading, from 0 to 1. Read it as long as it matters."""
        shares = [self._own.read(), self._waits.read()]
        machine = self._machine.read()
        return max(*shares, machine) if whole_machine else max(shares)


class _Share:
    """The growth of a count of seconds, as a share of the time between two readings."""

    def __init__(self, seconds: Callable[[], float], clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._at, self._last, self._share = clock(), seconds(), 0.0

    def read(self) -> float:
        now = self._clock()
        if now - self._at >= _SHORTEST_SECONDS:
            seconds = self._seconds()
            self._share = min(1.0, max(0.0, (seconds - self._last) / (now - self._at)))
            self._at, self._last = now, seconds
        return self._share


def _stalled_seconds(pressure: Path) -> float:
    """Return the seconds in which some task of a cgroup waited for a core; 0 without such a file."""
    return _number(pressure, lambda text: int(text.partition("total=")[2].split()[0]) / 1e6)


def _waited_seconds(schedstat: Path) -> float:
    """Return the seconds for which a thread has waited for a core; 0 where the system does not count them."""
    return _number(schedstat, lambda text: int(text.split()[1]) / 1e9)


def _number(path: Path, read: Callable[[str], float]) -> float:
    # A file may be there and not be readable: without PSI, opening it succeeds and reading it does not.
    try:
        return read(path.read_text())
    except (OSError, ValueError, IndexError):
        return 0.0
