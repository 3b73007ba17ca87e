"""The forkserver: a process that has NumPy and the kernels loaded and does nothing but fork workers.

The forkserver is multiprocessing's own. It starts before any gRPC object exists, and the dispatcher itself never forks.
A worker that the forkserver forks is up within milliseconds and shares its pages.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import current_process
from typing import Any, NamedTuple

from unlatch.common.errors import DirectoryError
from unlatch.common.machine.directories import private_directory
from unlatch.compute.errors import StartError
from unlatch.compute.ipc.frames import PLAIN, PRELOAD_VARIABLE, THREADS_VARIABLE
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.stopped import StoppedWatch
from unlatch.compute.worker.entry import enter

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
    """A new worker process: the dispatcher's end of its channel, and the pid of its parent."""

    process: ForkServerProcess
    channel: socket.socket
    parent: int


class ForkServer:
    """Starts worker processes. `blas_threads` is the number of threads that NumPy may use in each worker.

    Raises DirectoryError.
    """

    def __init__(self, kernels: Sequence[str], blas_threads: int, max_reply_bytes: int) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.max_reply_bytes = max_reply_bytes
        # One thread, so that starts do not race in multiprocessing.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="spawn")
        # Workers hold the reading end, and only the dispatcher holds the writing end. So the pipe breaks when the
        # dispatcher ends.
        self._dispatcher_alive, self._held = os.pipe2(os.O_CLOEXEC)
        for end in (self._dispatcher_alive, self._held):
            # Not closed by `close`, because the thread that spawns may still send the reading end.
            weakref.finalize(self, os.close, end)
        # The forkserver gets only an environment and names of modules to preload. The environment stays as it is set
        # here, because multiprocessing itself starts another forkserver if one has died.
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(blas_threads)))
        # GNU's OpenMP hangs after a fork if it has had several threads, and Numba ends a process that uses it then.
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ.setdefault("NUMBA_THREADING_LAYER", "forksafe")
        os.environ[PRELOAD_VARIABLE] = ",".join(kernels)
        self._directory = contextlib.ExitStack()
        self._make_directory()
        names = ("with_dispatcher", "loop", "entry")
        self._context.set_forkserver_preload([f"unlatch.compute.worker.{name}" for name in names])
        forkserver.ensure_running()

    @property
    def pid(self) -> int:
        """The pid of the forkserver; 0 if there is none."""
        server: Any = forkserver._forkserver  # noqa: SLF001 (its pid is not public)
        return server._forkserver_pid or 0  # noqa: SLF001

    def end(self, pid: int = 0) -> None:
        """Kill the forkserver, and wait for its end. With `pid`, only if the forkserver still has that pid.

        A forkserver never loads its modules again. The next `spawn` starts another forkserver.
        """
        if not self.pid or pid not in (0, self.pid):
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            # multiprocessing waits for the process later, so it is not reaped here.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def spawn(self, kind: str = PLAIN, *, unfit: int = 0) -> Spawned:
        """Start a worker process of a kind (`frames.PLAIN`, …).

        If the forkserver has the pid `unfit`, it is replaced first. Blocks for the milliseconds that a fork takes, and
        for as long as a new forkserver loads the kernels.
        """
        if unfit:
            self.end(unfit)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = self._context.Process(target=enter, args=(theirs, kind, self.max_reply_bytes))
            try:
                self._start(process)
                socket.send_fds(ours, [b" "], [self._dispatcher_alive])
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        # Room for all frames about two runs and their calls, even if the worker reads none of them.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
        return Spawned(process, ours, self.pid)

    async def spawn_within(
        self, seconds: float, kind: str = PLAIN, *, stopped_seconds: float = 0.0, unfit: int = 0
    ) -> Spawned:
        """Spawn a worker off the event loop. Raises StartError if there is none in time; then the forkserver is ended.

        A forkserver that is found stopped (SIGSTOP) for `stopped_seconds` meanwhile is ended sooner; 0 is never.
        """
        loop, pid = asyncio.get_running_loop(), self.pid
        why = ""

        def stopped(_: Exit) -> None:
            nonlocal why
            why = "the forkserver was stopped"
            self.end(pid)

        spawning = loop.run_in_executor(self._starter, partial(self.spawn, kind, unfit=unfit))
        watch = StoppedWatch(pid, stopped_seconds, stopped)
        late = not (await asyncio.wait([spawning], timeout=seconds))[0]
        watch.close()
        if late:
            why = f"the kernels were not loaded within worker_start_seconds={seconds:g}"
            # The thread that spawns waits for the forkserver, so it goes on now.
            await asyncio.to_thread(self.end)
        try:
            return await spawning
        except (OSError, EOFError, DirectoryError) as error:
            if isinstance(error, BrokenPipeError) and not why:
                raise StartError("a worker ended as it was forked") from error
            if isinstance(error, EOFError) and not why:
                why = "the forkserver ended as it loaded the kernels; `unlatch check` tells which of them ended it"
            raise StartError(f"a worker did not start: {why or error}", lasting=late) from error

    async def close(self) -> None:
        """Start no more workers, and end the forkserver."""
        self._starter.shutdown(wait=False, cancel_futures=True)
        # The forkserver would end with the dispatcher's process, but this process may go on (`serve --reload`).
        await asyncio.to_thread(self.end)
        self._directory.close()

    def _make_directory(self) -> None:
        """Make the directory for the forkserver's socket, and remove the one before. Raises DirectoryError."""
        # A directory that multiprocessing makes stays when this process is killed, and its path may be too long.
        self._directory.close()
        configuration: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001
        configuration["tempdir"] = str(self._directory.enter_context(private_directory()))
        # A later forkserver of this process must not use this directory once it is removed.
        self._directory.callback(configuration.pop, "tempdir", None)

    def _start(self, process: ForkServerProcess) -> None:
        """Start a process. Start another forkserver first if this one's socket has lost its name."""
        try:
            process.start()
        except (FileNotFoundError, ConnectionRefusedError):
            # The name was in a temporary directory, which has been emptied.
            self.end()
            self._make_directory()
            process.start()
