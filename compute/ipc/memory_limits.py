"""What memory a worker may have of its own: both ends, the worker's and the front's.

A worker starts with what its forkserver has loaded, pages that all workers share. What counts is what it takes on top:

    RLIMIT_DATA   the worker limits itself. The system refuses what is over it, NumPy raises MemoryError, and that call
                  alone ends RESOURCE_EXHAUSTED.
    RssAnon       the front watches it (upkeep.py), for what escapes the first: pages that were written and are then
                  made read-only, or that belong to a stack.

Shared segments, tensors of calls and replies, count in neither.
"""

import gc
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from unlatch.common.errors import ResourceExhausted
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.machine.memory import freed_bytes, give_freed_back, grow_by, keep_freed, put_back, take

# What NumPy frees stays with the worker: else every temporary is given back to the system and faulted in again. Larger
# arrays than this still come from mmap, and go back when they are freed.
_KEPT_BYTES = 512 * 1024 * 1024
# By how much the heap grows at a time. A step that does not fit a limit is refused whole: it is a small part of that.
_STEP_BYTES = 64 * 1024 * 1024
_STEPS_IN_A_LIMIT = 16
# Freed blocks smaller than this are left to a run on top of what its kernel declares.
_LEAST_HELD_BYTES = 1024 * 1024
# How far beyond its limit a worker may go to say that it has reached it.
_TO_SAY_SO_BYTES = 4 * 1024 * 1024

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A worker's. 0 is no limit, and never."""

    memory_bytes: int
    recycle_calls: int
    recycle_growth_bytes: int

    def refusal(self, kernels: Iterable[KernelSpec]) -> str:
        """Why these cannot be served: a kernel's author says that it needs more than a worker may have. Else empty.

        Whoever deploys it should hear so, and not callers, one large call at a time.
        """
        for spec in kernels:
            if spec.memory_bytes is not None and 0 < self.memory_bytes < spec.memory_bytes:
                limit = f"worker_memory_bytes={self.memory_bytes}"
                return f"kernel {spec.name} declares memory={spec.memory_bytes}, but a worker may have {limit}"
        return ""


class Taken(NamedTuple):
    """What a process has of its own, in bytes: in RAM (RssAnon), and as RLIMIT_DATA counts it."""

    resident: int
    data: int


class Footprint:
    """A process's `/proc/<pid>/statm`, which stays open: a reading takes 1.3 µs. Raises OSError once it is gone."""

    def __init__(self, pid: int) -> None:
        self._statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> Taken:
        """As it is now."""
        _, resident, shared, _, _, data, _ = os.pread(self._statm, 128, 0).split()
        return Taken((int(resident) - int(shared)) * _PAGE_BYTES, int(data) * _PAGE_BYTES)

    def close(self) -> None:
        """Read no more."""
        os.close(self._statm)


class Allowance:
    """The worker's own end. `memory_bytes` is what it may take beyond what it has now; 0 for no limit."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._footprint = Footprint(os.getpid())
        self._step = min(_STEP_BYTES, memory_bytes // _STEPS_IN_A_LIMIT) if memory_bytes else _STEP_BYTES
        _, hardest = resource.getrlimit(resource.RLIMIT_DATA)
        most = hardest
        if memory_bytes:
            most = _least(hardest, self._footprint.read().data + memory_bytes)
            hardest = _least(hardest, most + _TO_SAY_SO_BYTES)
        # What the worker keeps to, and what it can go to: made now, since there may be no room for as much as a tuple.
        self._usual, self._utmost = (most, hardest), (hardest, hardest)
        self._declared_binds = False
        keep_freed(largest_bytes=_KEPT_BYTES, most_bytes=_KEPT_BYTES, step_bytes=self._step)
        resource.setrlimit(resource.RLIMIT_DATA, self._usual)

    def during(self, spec: KernelSpec) -> AbstractContextManager[None]:
        """The limit of a run: narrower than the worker's where the kernel declares what it needs."""
        return _AS_IT_IS if spec.memory_bytes is None else self._narrowed(spec.memory_bytes)

    def exceeded(self, spec: KernelSpec) -> ResourceExhausted:
        """What is said of a run that was refused memory. Until the worker has shrunk it has room to say it in."""
        resource.setrlimit(resource.RLIMIT_DATA, self._utmost)
        if spec.memory_bytes is not None and self._declared_binds:
            limit = f"it declares: memory={spec.memory_bytes}"
        elif self._memory_bytes:
            limit = f"a worker may have: worker_memory_bytes={self._memory_bytes}"
        else:
            limit = "the system gives"
        return ResourceExhausted(f"kernel {spec.name} needed more memory than {limit}")

    def shrink(self) -> Taken:
        """Give back what is not in use, and tell what is left."""
        gc.collect()
        give_freed_back()
        resource.setrlimit(resource.RLIMIT_DATA, self._usual)
        return self._footprint.read()

    @contextmanager
    def _narrowed(self, run_bytes: int) -> Iterator[None]:
        usual, utmost = self._usual
        data = self._footprint.read().data
        resource.setrlimit(resource.RLIMIT_DATA, (_least(usual, data), utmost))
        # What malloc has kept it hands out without asking the system. So one run's worth is left to it, where there is
        # as much in one piece; the rest is held, untouched, until the run is over.
        room = take(run_bytes)
        step = min(self._step, run_bytes // _STEPS_IN_A_LIMIT)
        held = _take_freed(max(_LEAST_HELD_BYTES, step))
        put_back(room)
        limit = _least(usual, data + step + (run_bytes if room is None else 0))
        self._declared_binds = limit != usual
        grow_by(step)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, utmost))
        try:
            yield
        finally:
            for block in held:
                put_back(block)
            resource.setrlimit(resource.RLIMIT_DATA, self._usual)
            grow_by(self._step)


_AS_IT_IS = nullcontext()


def _take_freed(least_bytes: int) -> list[int]:
    """All that malloc keeps, in pieces of at least so much. The system must be refusing meanwhile."""
    taken = []
    size = freed_bytes()
    while size >= least_bytes:
        block = take(size)
        if block is None:
            size //= 2
        else:
            taken.append(block)
            size = min(size, freed_bytes())
    return taken


def _least(one: int, other: int) -> int:
    return min((limit for limit in (one, other) if limit != resource.RLIM_INFINITY), default=resource.RLIM_INFINITY)
