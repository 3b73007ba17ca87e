"""The forkserver as the dispatcher sees it: a process that has NumPy and the kernels loaded, and only forks workers.

    ForkServer          keeps a forkserver: starts another one if it has ended, is stopped, or has other kernels
    ForkServerProcess   one of them: its start, the workers that it forks, their exit codes, its end

It starts before any gRPC object exists, and the dispatcher itself never forks. A worker that it forks is up within
milliseconds and shares its pages. Its own end is `compute/worker/forkserver.py`, which any interpreter may run that has
what workers need (`worker_python`).
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import NamedTuple

import msgspec
import structlog

from unlatch.compute.errors import StartError
from unlatch.compute.ipc.fork_frames import (
    FORK_FRAME_BYTES,
    Fork,
    Forked,
    Imported,
    NotForked,
    decode_for_dispatcher,
    encode,
)
from unlatch.compute.ipc.frames import PLAIN, PRELOAD_VARIABLE, THREADS_VARIABLE
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.stopped import StoppedWatch
from unlatch.compute.worker.interpreter import ask, not_run, why_unfit

log = structlog.get_logger()

# Each BLAS that NumPy may come with, NumExpr and Numba read a variable of their own. OpenMP gets its threads in the
# workers (`preload.grant_openmp`).
_THREAD_VARIABLES = (
    THREADS_VARIABLE,
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)

# The size that Linux grants by default. The system's own data counts too, about 0.8 KiB a frame.
_CHANNEL_BYTES = 208 * 1024


class Spawned(NamedTuple):
    """A new worker process: pid, pidfd, the dispatcher's end of its channel, the exit code to come, its parent's pid.

    The exit code is negative for a signal, and None if the forkserver has ended before the worker.
    """

    pid: int
    pidfd: int
    channel: socket.socket
    exit_code: "asyncio.Future[int | None]"
    parent: int


class ForkServerEndedError(Exception):
    """A forkserver has ended, or has been killed, before it forked a worker. The message may say why."""


class ForkServer:
    """Starts worker processes. `blas_threads` is the number of threads that NumPy may use in each worker.

    `python` is an interpreter that workers run, or "" for the service's own. Raises StartError if there is no such
    file. Must be made on the event loop, in the main thread: the system ends a forkserver with the thread that has
    started it.
    """

    def __init__(self, kernels: Sequence[str], blas_threads: int, max_reply_bytes: int, *, python: str = "") -> None:
        self.max_reply_bytes = max_reply_bytes
        self._python = python
        self._environment = {
            "NUMBA_THREADING_LAYER": "forksafe",
            **os.environ,
            **dict.fromkeys(_THREAD_VARIABLES, str(blas_threads)),
            # GNU's OpenMP hangs after a fork if it has had several threads, and Numba ends a process that uses it then.
            "OMP_NUM_THREADS": "1",
            PRELOAD_VARIABLE: ",".join(kernels),
        }
        # One fork at a time, so that the forkserver's socket has room for every frame.
        self._turn = asyncio.Lock()
        self._process = ForkServerProcess(python, self._environment)
        # Workers hold the reading end, and only the dispatcher holds the writing end. So the pipe breaks when the
        # dispatcher ends.
        self._dispatcher_alive, self._held = os.pipe2(os.O_CLOEXEC)

    @property
    def pid(self) -> int:
        """The pid of the forkserver, or of the last one if it has ended."""
        return self._process.pid

    async def spawn_within(
        self, seconds: float, kind: str = PLAIN, *, stopped_seconds: float = 0.0, unfit: int = 0
    ) -> Spawned:
        """Start a worker process of a kind (`frames.PLAIN`, …).

        If the forkserver has the pid `unfit`, it is replaced first. Takes the milliseconds of a fork, and as long as a
        new forkserver loads the kernels. Raises StartError if there is no worker in time; then the forkserver is ended.
        A forkserver that is stopped (SIGSTOP) for `stopped_seconds` meanwhile is ended sooner; 0 is never.
        """
        used = self._process
        try:
            async with asyncio.timeout(seconds), self._turn:
                if unfit == self.pid:
                    # A forkserver never loads its modules again.
                    await self._process.end()
                while True:
                    used = self._running()
                    with suppress(BrokenPipeError, ConnectionResetError):
                        return await self._spawn(used, kind, stopped_seconds)
                    # It ended before it was asked.
                    await used.ended.wait()
        except TimeoutError as error:
            why = f"the kernels were not loaded within worker_start_seconds={seconds:g}"
            await used.end(why)
            raise StartError(f"a worker did not start: {why}", lasting=True) from error
        except ForkServerEndedError as error:
            why = str(error) or await self._why_ended(used)
            raise StartError(f"a worker did not start: {why}", lasting=used.unfit) from error
        except OSError as error:
            raise StartError(f"a worker did not start: {error}") from error

    async def close(self) -> None:
        """End the forkserver. The last workers end too, if there are any. Nothing may be started any more."""
        await self._process.end()
        for end in (self._dispatcher_alive, self._held):
            os.close(end)

    def _running(self) -> "ForkServerProcess":
        """Return the forkserver, after a new start if it has ended."""
        if self._process.ended.is_set():
            self._process = ForkServerProcess(self._python, self._environment)
        return self._process

    async def _spawn(self, process: "ForkServerProcess", kind: str, stopped_seconds: float) -> Spawned:
        def stopped(_: Exit) -> None:
            process.kill("the forkserver was stopped")

        watch = StoppedWatch(process.pid, stopped_seconds, stopped)
        try:
            return await process.fork(self._dispatcher_alive, kind, self.max_reply_bytes)
        finally:
            watch.close()

    async def _why_ended(self, process: "ForkServerProcess") -> str:
        """Say why a forkserver has ended by itself."""
        if process.loaded:
            return "the forkserver ended"
        # Without Unlatch, an interpreter cannot say itself what it lacks.
        if self._python and not process.introduced and (why := await ask(self._python)):
            return why
        return "the forkserver ended as it loaded the kernels; `unlatch check` tells which of them ended it"


class ForkServerProcess:
    """A forkserver, from its start to its end. It begins to load the kernels at once. Raises StartError."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self.ended = asyncio.Event()
        # Whether it has said what its interpreter has; whether that is not what a worker needs; and whether it has
        # loaded the kernels.
        self.introduced = self.unfit = self.loaded = False
        self._python = python
        self._why = ""
        self._loop = asyncio.get_running_loop()
        self._numbers = count()
        # The requests that are not answered, and the dispatcher's end of each worker's channel.
        self._asked: dict[int, tuple[asyncio.Future[Spawned], socket.socket]] = {}
        self._exit_codes: dict[int, asyncio.Future[int | None]] = {}
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = f"from unlatch.compute.worker.forkserver import main; main({theirs.fileno()})"
        try:
            with theirs:
                # Not by fork: `subprocess` starts a program by vfork, and none of gRPC's handlers runs.
                self._process = subprocess.Popen(  # noqa: S603 (the operator names the interpreter)
                    [python or sys.executable, "-c", program],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        except OSError as error:
            self._channel.close()
            raise StartError(not_run(python, error) if python else f"a worker did not start: {error}") from error
        self.pid = self._process.pid
        # Not reaped before `_ended`, so the pid is still this process's.
        self._pidfd = os.pidfd_open(self.pid)
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._readable)
        self._loop.add_reader(self._pidfd, self._ended)

    async def fork(self, dispatcher_alive: int, kind: str, max_reply_bytes: int) -> Spawned:
        """Fork a worker of a kind, once the kernels are loaded. `dispatcher_alive` is the reading end of a pipe.

        Raises ForkServerEndedError, OSError if the system refuses, and BrokenPipeError if it was never asked.
        """
        if self._why:
            raise ForkServerEndedError(self._why)
        number, told = next(self._numbers), self._loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # Room for all frames about two runs and their calls, even if the worker reads none of them.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
        self._asked[number] = told, ours
        try:
            with theirs:
                fork = encode(Fork(number, kind, max_reply_bytes))
                socket.send_fds(self._channel, [fork], [theirs.fileno(), dispatcher_alive])
            spawned: Spawned = await told
        except BaseException:
            # A worker that is forked all the same ends by itself, as its channel is closed.
            ours.close()
            if told.done() and not told.cancelled() and told.exception() is None:
                os.close(told.result().pidfd)
            raise
        finally:
            del self._asked[number]
        return spawned

    def kill(self, why: str = "") -> None:
        """Kill the forkserver; `why` is what those hear that wait for a worker."""
        self._why = self._why or why
        if not self.ended.is_set():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self, why: str = "") -> None:
        """Kill the forkserver, and wait for its end."""
        self.kill(why)
        await self.ended.wait()

    def _readable(self) -> bool:
        """Read one frame and handle it. Returns False if there is none, or no sense in it: then it is killed."""
        try:
            frame, descriptors, _, _ = socket.recv_fds(
                self._channel, FORK_FRAME_BYTES, 1, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return False
        except OSError:
            frame, descriptors = b"", []
        try:
            if frame:
                self._hear(frame, descriptors)
                return True
        except (msgspec.DecodeError, KeyError, ValueError) as error:
            log.warning("forkserver sent an undecodable frame", pid=self.pid, error=str(error)[:200])
            for descriptor in descriptors:
                os.close(descriptor)
        self._loop.remove_reader(self._channel)
        self.kill()
        return False

    def _hear(self, frame: bytes, descriptors: Sequence[int]) -> None:
        if not self.introduced:
            self._introduced(msgspec.json.decode(frame, type=dict[str, str]))
            return
        message = decode_for_dispatcher(frame)
        if isinstance(message, Imported):
            self.loaded = True
            for module in message.locked_by:
                log.warning("import turned the interpreter lock on", module=module)
        elif isinstance(message, Forked):
            (pidfd,) = descriptors
            exit_code = self._exit_codes[message.pid] = self._loop.create_future()
            told, channel = self._asked.get(message.number, (None, None))
            if told is None or channel is None or told.done():
                os.close(pidfd)
            else:
                told.set_result(Spawned(message.pid, pidfd, channel, exit_code, self.pid))
        elif isinstance(message, NotForked):
            told, _ = self._asked.get(message.number, (None, None))
            if told is not None and not told.done():
                told.set_exception(OSError(f"the system refused a fork: {message.why}"))
        else:
            self._exit_codes.pop(message.pid).set_result(message.code)

    def _introduced(self, found: dict[str, str]) -> None:
        """Compare what another interpreter has with what workers need. The service's own has it."""
        self.introduced = True
        if not self._python:
            return
        if why := why_unfit(self._python, found):
            self.unfit = True
            self.kill(why)
        else:
            log.info("workers run another interpreter", interpreter=self._python, versions=found)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        # What it sent before its end counts: a worker that it has reported serves.
        while self._readable():
            pass
        self._loop.remove_reader(self._channel)
        self._channel.close()
        self._process.wait()
        self.ended.set()
        os.close(self._pidfd)
        for told, _ in self._asked.values():
            if not told.done():
                told.set_exception(ForkServerEndedError(self._why))
        for exit_code in self._exit_codes.values():
            exit_code.set_result(None)
        self._exit_codes.clear()
