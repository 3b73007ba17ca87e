"""One real worker process, and what came of a run in it.

Nothing is imitated: the worker is forked by the service's own forkserver and gets its inputs in sealed shared memory.
What is added are limits, so that a kernel that misbehaves hurts nobody: the time of a run, and the worker's memory.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from unlatch.check.cases import Case
from unlatch.check.probes import SETTLE
from unlatch.common.kernel.tensors import Array, dtype_name, pack_bytes, view
from unlatch.compute.ipc.arena import Segment, offsets
from unlatch.compute.ipc.frames import (
    Done,
    Failed,
    Forget,
    Learn,
    Loaded,
    Member,
    Misfit,
    Parameters,
    Ready,
    Run,
    Shrunk,
    Tensor,
    ToFront,
)
from unlatch.compute.pool.exits import POOL_STOPS, End
from unlatch.compute.pool.forkserver import ForkServer, StartError
from unlatch.compute.pool.process import WorkerProcess

_FIRST_REPLY_BYTES = 1024 * 1024
_STARTS_WITHIN_SECONDS = 60.0
# Lines of /proc/<pid>/status. What is shared is the call's own tensors and libraries' code.
_PEAK_OF_RESIDENT = "VmHWM"
_RESIDENT = "VmRSS"
_SHARED = ("RssShmem", "RssFile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run that gave a result. `memory_bytes` is what it took at its peak beyond what the worker had before."""

    outputs: tuple[Array, ...]
    seconds: float
    memory_bytes: int
    keeps_input: bool
    printed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A run that ended with an error: its google.rpc.Code, and the traceback where the error was unexpected."""

    code: int
    message: str
    story: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A run whose worker is gone: it did not end in time (`seconds` is set), or it took the worker with it."""

    reason: str
    seconds: float = 0.0


Outcome = Ended | Refused | Lost


class Workers:
    """Where workers come from. One a process: it owns the process's forkserver."""

    def __init__(self, modules: Sequence[str], *, seconds: float, memory_bytes: int, blas_threads: int) -> None:
        self.blas_threads = blas_threads
        self._seconds = seconds
        self._printed = _Printed()
        with self._printed.captured():
            self._forkserver = ForkServer(
                [*modules, "unlatch.check.probes"],
                blas_threads,
                max_reply_bytes=memory_bytes,
                worker_memory_bytes=memory_bytes,
            )

    @asynccontextmanager
    async def worker(self) -> AsyncIterator["Worker"]:
        """A fresh one, ended afterwards whatever it does."""
        worker = await Worker.start(self._forkserver, self._printed, self._seconds)
        try:
            yield worker
        finally:
            await worker.end()


class Worker:
    """A worker process that runs one call at a time."""

    def __init__(self, seconds: float, printed: "_Printed") -> None:
        self._lost: Lost | None = None
        self._seconds = seconds
        self._printed = printed
        self._numbers = count()
        # Where SETTLE answers.
        self._aside = Segment(next(self._numbers), 4096, name="unlatch-reply", sealed=False)
        self._aside_is_new = True
        self._process: WorkerProcess | None = None
        self._answer: asyncio.Future[Done | Failed | Ready | Misfit | Lost] = _future()
        self._gone = asyncio.Event()

    @classmethod
    async def start(cls, forkserver: ForkServer, printed: "_Printed", seconds: float) -> Self:
        """Start one and wait until it takes Runs. Raises StartError where it does not."""
        worker = cls(seconds, printed)
        process, channel, _ = forkserver.spawn()
        worker._process = WorkerProcess(process, channel, worker._heard, worker._ended)
        async with asyncio.timeout(_STARTS_WITHIN_SECONDS):
            answer = await worker._answer
        if not isinstance(answer, Ready):
            await worker.end()
            why = answer.message if isinstance(answer, Misfit) else answer
            raise StartError(f"a worker does not start: {why}")
        return worker

    @property
    def lost(self) -> bool:
        """Whether it runs nothing more."""
        return self._lost is not None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    async def run(self, kernel: str, case: Case) -> Outcome:
        """Run a kernel. A worker that is lost by it runs nothing more, and says again how it was lost."""
        if self._lost is not None:
            return self._lost
        inputs, tensors = _laid_out(next(self._numbers), case.arrays)
        reply = Segment(next(self._numbers), _FIRST_REPLY_BYTES, name="unlatch-reply", sealed=False)
        try:
            self._printed.forget()
            resident = self._resident_anew()
            answer = await self._run(kernel, tensors, case.scalars, inputs, reply)
            if isinstance(answer, Lost):
                return answer
            memory_bytes = max(0, _status(self.pid, _PEAK_OF_RESIDENT) - _status(self.pid, *_SHARED) - resident)
            keeps_input = await self._forgets(inputs, reply)
            if isinstance(answer, Failed):
                return Refused(code=answer.code, message=answer.message, story=answer.log)
            return Ended(
                outputs=_outputs(answer.results[0].tensors, reply),
                seconds=answer.run_nanoseconds / 1e9,
                memory_bytes=memory_bytes,
                keeps_input=keeps_input,
                printed=self._printed.read(),
            )
        except (FileNotFoundError, ProcessLookupError):
            # Its /proc is gone: something that the kernel has left behind has ended it.
            self._lost = Lost(reason="it ended after it had answered")
            return self._lost
        finally:
            inputs.close()
            reply.close()

    async def threads(self) -> tuple[int, int]:
        """How many threads Python knows of, and the most that a BLAS may use; zeros of a worker that cannot tell."""
        answer = await self._run(SETTLE, (), {}, None, self._aside)
        if not isinstance(answer, Done):
            return 0, 0
        active, pool = _outputs(answer.results[0].tensors, self._aside)[0].tolist()
        return active, pool

    async def end(self) -> None:
        """Kill it and wait until it is gone."""
        assert self._process is not None
        if not self._gone.is_set():
            self._process.kill(POOL_STOPS)
        await self._gone.wait()
        self._aside.close()

    async def _run(
        self, kernel: str, tensors: tuple[Tensor, ...], scalars: Parameters, inputs: Segment | None, reply: Segment
    ) -> Done | Failed | Lost:
        assert self._process is not None
        self._answer = _future()
        if inputs is not None:
            self._process.send(Learn(inputs.number, writable=False), inputs.fd)
        if reply is not self._aside or self._aside_is_new:
            self._process.send(Learn(reply.number, writable=True), reply.fd)
        self._aside_is_new = self._aside_is_new and reply is not self._aside
        member = Member(next(self._numbers), -1 if inputs is None else inputs.number, tensors)
        self._process.send(Run(kernel, scalars, reply.number, (member,)))
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._answer
        except TimeoutError:
            answer = Lost(reason=f"it did not end within {self._seconds:g} s", seconds=self._seconds)
        assert isinstance(answer, Done | Failed | Lost)
        self._lost = answer if isinstance(answer, Lost) else None
        return answer

    async def _forgets(self, inputs: Segment, reply: Segment) -> bool:
        """Have it let go of the segments; whether something there still holds the inputs."""
        assert self._process is not None
        self._process.send(Forget([inputs.number], [reply.number]))
        # Frames are taken in order: when this is answered, that has been seen to.
        await self.threads()
        return not self.lost and os.fstat(inputs.fd).st_ino in _mapped_inputs(self.pid)

    def _resident_anew(self) -> int:
        """What is in RAM and its own alone, in bytes; the peak is reckoned from here on."""
        # Where the system does not grant it (gVisor has none) the peak is the worker's of all its life.
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return _status(self.pid, _RESIDENT) - _status(self.pid, *_SHARED)

    def _heard(self, frame: ToFront) -> None:
        if not isinstance(frame, Loaded | Shrunk) and not self._answer.done():
            self._answer.set_result(frame)

    def _ended(self, end: End) -> None:
        self._gone.set()
        if not self._answer.done():
            self._answer.set_result(Lost(reason=str(end)))


class _Printed:
    """What workers write to stdout and stderr: the forkserver that they come from has this file as both."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("unlatch-check", os.MFD_CLOEXEC)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)

    def captured(self) -> "_Captured":
        """While this is entered, processes that are started write here."""
        return _Captured(self._fd)

    def forget(self) -> None:
        os.ftruncate(self._fd, 0)

    def read(self) -> str:
        return os.pread(self._fd, 4096, 0).decode(errors="replace")


class _Captured:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept: list[int] = []

    def __enter__(self) -> None:
        self._kept = [os.dup(1), os.dup(2)]
        os.dup2(self._fd, 1)
        os.dup2(self._fd, 2)

    def __exit__(self, *_: object) -> None:
        for fd, kept in enumerate(self._kept, start=1):
            os.dup2(kept, fd)
            os.close(kept)


def _future() -> "asyncio.Future[Done | Failed | Ready | Misfit | Lost]":
    return asyncio.get_running_loop().create_future()


def _laid_out(number: int, arrays: Sequence[Array]) -> tuple[Segment, tuple[Tensor, ...]]:
    """Arrays in a segment as the front would have put them there, each on its boundary."""
    buffers = [pack_bytes(array) if array.dtype.kind == "O" else array.tobytes() for array in arrays]
    starts, size = offsets([len(buffer) for buffer in buffers])
    segment = Segment(number, max(size, 4096), name="unlatch-input", sealed=True)
    for start, buffer in zip(starts, buffers, strict=True):
        segment.view[start : start + len(buffer)] = buffer
    return segment, tuple(
        Tensor(dtype_name(array), array.shape, start, len(buffer))
        for array, start, buffer in zip(arrays, starts, buffers, strict=True)
    )


def _outputs(tensors: Sequence[Tensor], reply: Segment) -> tuple[Array, ...]:
    reply.follow_growth_to(max((tensor.offset + tensor.length for tensor in tensors), default=0))
    return tuple(
        view("output", reply.view, tensor.dtype, tensor.shape, tensor.offset, tensor.length).copy()
        for tensor in tensors
    )


def _status(pid: int, *names: str) -> int:
    """The sum of these lines of /proc/<pid>/status, in bytes. Raises OSError for a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    if not found.keys() >= set(names):
        raise ProcessLookupError(f"process {pid} has ended, and nobody has waited for it yet")
    return sum(int(found[name].split()[0]) * 1024 for name in names)


def _mapped_inputs(pid: int) -> set[int]:
    """The inodes of the input segments that a process has mapped."""
    lines = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {int(line[4]) for line in lines if len(line) > 5 and "memfd:unlatch-input" in line[5]}
