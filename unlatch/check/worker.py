"""A real worker process, and the outcomes of runs in it.

The worker is a service's: the same forkserver forks it, and its inputs lie in sealed shared memory. A check only adds
limits to the time of a run and to the worker's memory, so that a misbehaving kernel does no harm.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from unlatch.check.cases import Case
from unlatch.check.probes import SETTLE
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.kernel.tensors import Array, dtype_name, pack_bytes, view
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder
from unlatch.compute.errors import StartError
from unlatch.compute.ipc import frames as wire
from unlatch.compute.ipc.arena import Segment, offsets
from unlatch.compute.pool.exits import POOL_STOPS, Exit
from unlatch.compute.pool.forkserver import ForkServer
from unlatch.compute.pool.process import WorkerProcess

_FIRST_REPLY_BYTES = 1024 * 1024
_STARTS_WITHIN_SECONDS = 60.0
# A probe takes milliseconds, whatever a kernel may take.
_PROBED_WITHIN_SECONDS = 20.0
# Lines of /proc/<pid>/status. Shared memory is the call's own tensors and the code of libraries.
_PEAK_OF_RESIDENT = "VmHWM"
_RESIDENT = "VmRSS"
_SHARED = ("RssShmem", "RssFile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run that returned a result. `memory_bytes` is its peak memory beyond what the worker had before."""

    outputs: tuple[Array, ...]
    seconds: float
    memory_bytes: int
    keeps_input: bool
    drawn: tuple[str, ...]
    printed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A run that failed with an error: its google.rpc.Code, and the traceback if the error was unexpected."""

    code: int
    message: str
    story: str

    @property
    def last_lines(self) -> list[str]:
        """The end of the traceback of the kernel's own exception, without the worker's error that it caused."""
        text = self.story.strip()
        own, _, last = text.rpartition("\n\nThe above exception was the direct cause")
        return (own if "common.errors.Internal:" in last else text).splitlines()[-3:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A run that lost its worker: it did not end in time (`seconds` is set), or the worker died."""

    reason: str
    seconds: float = 0.0


Outcome = Ended | Refused | Lost


class CheckWorkers:
    """Starts workers under check. A process has one of these, which owns the process's forkserver."""

    def __init__(
        self, modules: Sequence[str], *, seconds: float, memory_bytes: int, blas_threads: int, python: str = ""
    ) -> None:
        self.blas_threads = blas_threads
        self._seconds = seconds
        self._printed = _Printed()
        with self._printed.captured():
            self._forkserver = ForkServer(
                [*modules, "unlatch.check.probes"],
                blas_threads,
                max_reply_bytes=memory_bytes,
                python=python,
            )
        self._memory_bytes = memory_bytes

    @asynccontextmanager
    async def worker(self, spec: KernelSpec) -> AsyncIterator["CheckWorker"]:
        """Start a fresh worker of the kind that runs a kernel, and end it afterwards."""
        kind = wire.PLAIN if spec.concurrency is None else wire.ASYNC
        worker = await CheckWorker.start(self._forkserver, kind, self._printed, self._seconds, self._memory_bytes)
        try:
            yield worker
        finally:
            await worker.end()

    async def close(self) -> None:
        """End the forkserver. Every worker must have ended."""
        await self._forkserver.close()


class CheckWorker:
    """A worker process under check, which runs one call at a time."""

    def __init__(self, seconds: float, printed: "_Printed") -> None:
        self._lost: Lost | None = None
        self._seconds = seconds
        self._printed = printed
        self._numbers = count()
        self._process: WorkerProcess | None = None
        self._answer: asyncio.Future[wire.Done | wire.Failed | wire.Ready | wire.Misfit | Lost] = _future()
        self._gone = asyncio.Event()
        # The number of the segment for the reply to the present run.
        self._reply = 0

    @classmethod
    async def start(
        cls, forkserver: ForkServer, kind: str, printed: "_Printed", seconds: float, memory_bytes: int
    ) -> Self:
        """Start a worker and wait until it is ready. Raises StartError if it does not become so."""
        worker = cls(seconds, printed)
        spawned = await forkserver.spawn_within(_STARTS_WITHIN_SECONDS, kind)
        worker._process = WorkerProcess(spawned, worker._heard, worker._ended, errors=InternalErrors(Recorder()))
        async with asyncio.timeout(_STARTS_WITHIN_SECONDS):
            answer = await worker._answer
        if not isinstance(answer, wire.Ready):
            await worker.end()
            why = answer.message if isinstance(answer, wire.Misfit) else answer
            raise StartError(f"a worker did not start: {why}")
        worker._send(wire.Serve(memory_bytes))
        return worker

    @property
    def lost(self) -> bool:
        """Whether the worker is lost and runs nothing more."""
        return self._lost is not None

    @property
    def pid(self) -> int:
        """The worker's process id."""
        assert self._process is not None
        return self._process.pid

    async def run(self, kernel: str, case: Case) -> Outcome:
        """Run a kernel. After a run that loses the worker, every further run returns that same loss."""
        if self._lost is not None:
            return self._lost
        inputs, tensors = _laid_out(next(self._numbers), case.arrays)
        try:
            self._printed.forget()
            resident = self._resident_anew()
            self._send(wire.Learn(inputs.number, writable=False), inputs.fd)
            member = wire.Member(next(self._numbers), inputs.number, tensors)
            left_out = tuple(place for place, array in enumerate(case.arrays) if array is None)
            answer, outputs = await self._run(kernel, case.scalars, member, self._seconds, left_out)
            if isinstance(answer, Lost):
                return answer
            memory_bytes = max(0, _status(self.pid, _PEAK_OF_RESIDENT) - _status(self.pid, *_SHARED) - resident)
            # Frames are handled in order: when the worker has settled, the segment has been forgotten.
            self._send(wire.Forget([inputs.number], []))
            _, _, drawn = await self.settle()
            if isinstance(answer, wire.Failed):
                return Refused(code=answer.code, message=answer.message, story=answer.log)
            return Ended(
                outputs=outputs,
                seconds=answer.run_nanoseconds / 1e9,
                memory_bytes=memory_bytes,
                keeps_input=not self.lost and os.fstat(inputs.fd).st_ino in _mapped_inputs(self.pid),
                drawn=drawn,
                printed=self._printed.read(),
            )
        except (FileNotFoundError, ProcessLookupError):
            # /proc/<pid> is gone: something that the kernel left behind has ended the process.
            self._lost = Lost(reason="the worker ended after it had answered")
            return self._lost
        finally:
            inputs.close()

    async def settle(self) -> tuple[int, int, tuple[str, ...]]:
        """Return what the probe reports (`probes.Inspection`); nothing from a worker that cannot tell."""
        member = wire.Member(next(self._numbers), -1, ())
        answer, outputs = await self._run(SETTLE, {}, member, _PROBED_WITHIN_SECONDS)
        if not isinstance(answer, wire.Done):
            return 0, 0, ()
        threads, drawn = (output.tolist() for output in outputs)
        return *threads, tuple(name.decode() for name in drawn)

    async def end(self) -> None:
        """Kill the worker and wait until it has ended."""
        assert self._process is not None
        if not self._gone.is_set():
            self._process.kill(POOL_STOPS)
        await self._gone.wait()

    async def _run(
        self,
        kernel: str,
        scalars: wire.Parameters,
        member: wire.Member,
        seconds: float,
        left_out: tuple[int, ...] = (),
    ) -> tuple[wire.Done | wire.Failed | Lost, tuple[Array, ...]]:
        """Run a kernel with a reply segment of its own. Returns the answer, and the outputs of a run that is done."""
        reply = Segment(next(self._numbers), _FIRST_REPLY_BYTES, name="unlatch-reply", sealed=False)
        try:
            self._answer = _future()
            self._reply = reply.number
            self._send(wire.Learn(reply.number, writable=True), reply.fd)
            self._send(wire.RunFrame(kernel, scalars, reply.number, (member,), left_out))
            try:
                async with asyncio.timeout(seconds):
                    answer = await self._answer
            except TimeoutError:
                answer = Lost(reason=f"the run did not end within {seconds:g} s", seconds=seconds)
            assert isinstance(answer, wire.Done | wire.Failed | Lost)
            self._lost = answer if isinstance(answer, Lost) else None
            self._send(wire.Forget([], [reply.number]))
            return answer, _outputs(answer, reply) if isinstance(answer, wire.Done) else ()
        finally:
            reply.close()

    def _send(self, frame: wire.ToWorker, fd: int | None = None) -> None:
        assert self._process is not None
        self._process.send(frame, fd)

    def _resident_anew(self) -> int:
        """The worker's own bytes in RAM, without shared memory. Its peak is counted from now on."""
        # Where the system has no such file (gVisor), the peak is that of the worker's whole life.
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return _status(self.pid, _RESIDENT) - _status(self.pid, *_SHARED)

    def _heard(self, frame: wire.ToDispatcher) -> None:
        if isinstance(frame, wire.Wants):
            self._send(wire.Lend(frame.call, self._reply))
        elif not isinstance(frame, wire.Loaded | wire.Shrunk | wire.AsyncFrame) and not self._answer.done():
            self._answer.set_result(frame)

    def _ended(self, cause: Exit) -> None:
        self._gone.set()
        if not self._answer.done():
            self._answer.set_result(Lost(reason=str(cause)))


class _Printed:
    """The output of workers: their forkserver has this file as stdout and stderr."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("unlatch-check", os.MFD_CLOEXEC)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Redirect the output of processes that are started within this context to the file."""
        kept = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(self._fd, fd)
            yield
        finally:
            for fd, own in enumerate(kept, start=1):
                os.dup2(own, fd)
                os.close(own)

    def forget(self) -> None:
        os.ftruncate(self._fd, 0)

    def read(self) -> str:
        return os.pread(self._fd, 4096, 0).decode(errors="replace")


def _future() -> "asyncio.Future[wire.Done | wire.Failed | wire.Ready | wire.Misfit | Lost]":
    return asyncio.get_running_loop().create_future()


def _laid_out(number: int, given: Sequence[Array | None]) -> tuple[Segment, tuple[wire.Tensor, ...]]:
    """Put arrays in a segment as the dispatcher would, each on an aligned boundary."""
    arrays = [array for array in given if array is not None]
    buffers = [pack_bytes(array) if array.dtype.kind == "O" else array.tobytes() for array in arrays]
    starts, size = offsets([len(buffer) for buffer in buffers])
    segment = Segment(number, max(size, 4096), name="unlatch-input", sealed=True)
    for start, buffer in zip(starts, buffers, strict=True):
        segment.view[start : start + len(buffer)] = buffer
    return segment, tuple(
        wire.Tensor(dtype_name(array), array.shape, start, len(buffer))
        for array, start, buffer in zip(arrays, starts, buffers, strict=True)
    )


def _outputs(done: wire.Done, reply: Segment) -> tuple[Array, ...]:
    tensors = done.results[0].tensors
    reply.follow_growth_to(max((tensor.offset + tensor.length for tensor in tensors), default=0))
    memory = reply.view if done.inline is None else memoryview(done.inline)
    return tuple(
        view("output", memory, tensor.dtype, tensor.shape, tensor.offset, tensor.length).copy() for tensor in tensors
    )


def _status(pid: int, *names: str) -> int:
    """The sum of these lines of /proc/<pid>/status, in bytes. Raises OSError for a process that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    if not found.keys() >= set(names):
        raise ProcessLookupError(f"process {pid} has ended, and its parent has not waited for it yet")
    return sum(int(found[name].split()[0]) * 1024 for name in names)


def _mapped_inputs(pid: int) -> set[int]:
    """The inodes of the input segments that a process has mapped."""
    lines = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {int(line[4]) for line in lines if len(line) > 5 and "memfd:unlatch-input" in line[5]}
