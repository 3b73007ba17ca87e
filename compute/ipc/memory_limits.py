"""The limit on a worker's own memory, at both ends: the worker's and the dispatcher's.

A worker starts with the pages that its forkserver has loaded, which all workers share. What it allocates beyond them
counts, in two ways:

    RLIMIT_DATA   the worker's limit on itself. The system refuses more, NumPy raises MemoryError, and only that call
                  fails, with RESOURCE_EXHAUSTED.
    RssAnon       the dispatcher watches it (pool/recycling.py), for what RLIMIT_DATA does not count: pages that were
                  written and then made read-only, and stacks.

Shared segments, which hold the tensors of calls and replies, count in neither.
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

# Memory that NumPy frees stays with the worker up to this size; otherwise every temporary array would be returned to
# the system and faulted in again. Larger arrays still come from mmap, and are returned when they are freed.
_KEPT_BYTES = 512 * 1024 * 1024
# The heap grows by steps of this size. A step that exceeds a limit is refused whole, so it is a small part of a limit.
_STEP_BYTES = 64 * 1024 * 1024
_STEPS_IN_A_LIMIT = 16
# Freed blocks smaller than this stay available to a run, on top of the memory that its kernel declares.
_LEAST_HELD_BYTES = 1024 * 1024
# Extra memory that a worker may use to report that it has reached its limit.
_TO_SAY_SO_BYTES = 4 * 1024 * 1024

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimits:
    """The limits of each worker. For memory 0 is no limit; for recycling 0 is never."""

    memory_bytes: int
    recycle_calls: int
    recycle_growth_bytes: int

    def refusal(self, kernels: Iterable[KernelSpec]) -> str:
        """Why these kernels cannot be served: one declares more memory than a worker may have. Empty if they can.

        The operator should learn this at start, rather than callers later, one large call at a time.
        """
        for spec in kernels:
            if spec.memory_bytes is not None and 0 < self.memory_bytes < spec.memory_bytes:
                limit = f"worker_memory_bytes={self.memory_bytes}"
                return f"kernel {spec.name} declares memory={spec.memory_bytes}, but a worker may have {limit}"
        return ""


class Taken(NamedTuple):
    """A process's own memory in bytes: in RAM (RssAnon), and as RLIMIT_DATA counts it."""

    resident: int
    data: int


class Footprint:
    """A process's open `/proc/<pid>/statm`: one reading takes 1.3 µs. Raises OSError once the process is gone."""

    def __init__(self, pid: int) -> None:
        self._statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> Taken:
        """Read the present figures."""
        _, resident, shared, _, _, data, _ = os.pread(self._statm, 128, 0).split()
        return Taken((int(resident) - int(shared)) * _PAGE_BYTES, int(data) * _PAGE_BYTES)

    def close(self) -> None:
        """Close the file."""
        os.close(self._statm)


class Allowance:
    """The worker's limit on itself. `memory_bytes` is what it may use beyond what it has now; 0 for no limit."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._footprint = Footprint(os.getpid())
        self._step = min(_STEP_BYTES, memory_bytes // _STEPS_IN_A_LIMIT) if memory_bytes else _STEP_BYTES
        _, hardest = resource.getrlimit(resource.RLIMIT_DATA)
        most = hardest
        if memory_bytes:
            most = _least(hardest, self._footprint.read().data + memory_bytes)
            hardest = _least(hardest, most + _TO_SAY_SO_BYTES)
        # The usual limit and the one for reports, made now: later there may be no memory left even for a tuple.
        self._usual, self._utmost = (most, hardest), (hardest, hardest)
        self._declared_binds = False
        keep_freed(largest_bytes=_KEPT_BYTES, most_bytes=_KEPT_BYTES, step_bytes=self._step)
        resource.setrlimit(resource.RLIMIT_DATA, self._usual)

    def during(self, spec: KernelSpec) -> AbstractContextManager[None]:
        """A context with the limit of a run, which is lower than the worker's if the kernel declares its memory."""
        return _AS_IT_IS if spec.memory_bytes is None else self._narrowed(spec.memory_bytes)

    def exceeded(self, spec: KernelSpec) -> ResourceExhausted:
        """The error of a run that ran out of memory. Until `shrink`, the worker has extra memory to report it."""
        resource.setrlimit(resource.RLIMIT_DATA, self._utmost)
        if spec.memory_bytes is not None and self._declared_binds:
            limit = f"it declares: memory={spec.memory_bytes}"
        elif self._memory_bytes:
            limit = f"a worker may have: worker_memory_bytes={self._memory_bytes}"
        else:
            limit = "the system gives"
        return ResourceExhausted(f"kernel {spec.name} needed more memory than {limit}")

    def shrink(self) -> Taken:
        """Free what is not in use, and report what is left."""
        gc.collect()
        give_freed_back()
        resource.setrlimit(resource.RLIMIT_DATA, self._usual)
        return self._footprint.read()

    @contextmanager
    def _narrowed(self, run_bytes: int) -> Iterator[None]:
        usual, utmost = self._usual
        data = self._footprint.read().data
        resource.setrlimit(resource.RLIMIT_DATA, (_least(usual, data), utmost))
        # malloc hands out freed blocks that it has kept without asking the system. So one run's worth is left to it, if
        # there is as much in one piece; the rest is held back, untouched, until the run is over.
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
    """Allocate all that malloc keeps, in pieces of at least `least_bytes`. The system must refuse more meanwhile."""
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
