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
from unlatch.compute.ipc.frames import PRELOAD_VARIABLE, THREADS_VARIABLE
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.stopped import StoppedWatch
from unlatch.compute.worker.entry import enter

# Every BLAS that NumPy may come with reads its own. OpenMP gets its threads in the workers (`preload.grant_openmp`).
_THREAD_VARIABLES = (
    THREADS_VARIABLE,
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)

# What any Linux grants; it counts the system's own bookkeeping too, about 0.8 KiB a frame.
_CHANNEL_BYTES = 208 * 1024


class Spawned(NamedTuple):
    """A new worker process: the dispatcher's end of its channel, and the pid of its parent."""

    process: ForkServerProcess
    channel: socket.socket
    parent: int


class ForkServer:
    """Starts worker processes. `blas_threads` is what each worker's NumPy may use, set before NumPy loads.

    `worker_memory_bytes` is what each may take beyond what it starts with; 0 for no limit. Raises DirectoryError.
    """

    def __init__(
        self, kernels: Sequence[str], blas_threads: int, max_reply_bytes: int, worker_memory_bytes: int
    ) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.max_reply_bytes = max_reply_bytes
        self._worker_memory_bytes = worker_memory_bytes
        # One thread, so that starts do not race in multiprocessing.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="spawn")
        # Workers hold the reading end, the dispatcher alone the writing end: when it is gone, so is the pipe.
        self._dispatcher_alive, self._held = os.pipe2(os.O_CLOEXEC)
        for end in (self._dispatcher_alive, self._held):
            # Later than `close`, since the thread that spawns may still send one.
            weakref.finalize(self, os.close, end)
        # The forkserver takes nothing but an environment and names of modules to preload. The environment stays as it
        # is set here: multiprocessing starts another forkserver by itself where one has died.
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
        """The forkserver's process; 0 when there is none."""
        server: Any = forkserver._forkserver  # noqa: SLF001 (it tells its pid in no other way)
        return server._forkserver_pid or 0  # noqa: SLF001

    def end(self, pid: int = 0) -> None:
        """End the forkserver, whatever it is doing, and wait for that; or that very one, if it is still there.

        What it has loaded, or has failed to load, it has for good: the next is begun by the next `spawn`.
        """
        if not self.pid or pid not in (0, self.pid):
            return
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            # multiprocessing waits for it too, later, and must find that it has ended.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def spawn(self, *, unfit: int = 0) -> Spawned:
        """A new worker process; not from the forkserver with that pid, which is replaced if it still runs.

        Blocks for the milliseconds that a fork takes, and for as long as a new forkserver loads the kernels.
        """
        if unfit:
            self.end(unfit)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = self._context.Process(
                target=enter, args=(theirs, self.max_reply_bytes, self._worker_memory_bytes)
            )
            try:
                self._start(process)
                socket.send_fds(ours, [b" "], [self._dispatcher_alive])
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        # Room for what is said of all the calls of two Runs to a worker that listens to none of it.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
        return Spawned(process, ours, self.pid)

    async def spawn_within(self, seconds: float, *, stopped_seconds: float = 0.0, unfit: int = 0) -> Spawned:
        """Spawn a worker off the event loop. Raises StartError if there is none in time; then the forkserver is ended.

        A forkserver that is found stopped (SIGSTOP) for `stopped_seconds` meanwhile is ended sooner; 0 is never.
        """
        loop, pid = asyncio.get_running_loop(), self.pid
        why = ""

        def stopped(_: Exit) -> None:
            nonlocal why
            why = "the forkserver was stopped"
            self.end(pid)

        spawning = loop.run_in_executor(self._starter, partial(self.spawn, unfit=unfit))
        watch = StoppedWatch(pid, stopped_seconds, stopped)
        late = not (await asyncio.wait([spawning], timeout=seconds))[0]
        watch.close()
        if late:
            why = f"the kernels were not loaded within worker_start_seconds={seconds:g}"
            # What blocks the thread that spawns ends with the forkserver.
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
        # The forkserver would end with the dispatcher; but one that hangs in a kernel module's import does not notice.
        await asyncio.to_thread(self.end)
        self._directory.close()

    def _make_directory(self) -> None:
        """Make the directory for the forkserver's socket, in place of one that there was. Raises DirectoryError."""
        # multiprocessing would make a directory that stays when this process is killed, or has too long a path.
        self._directory.close()
        configuration: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001
        configuration["tempdir"] = str(self._directory.enter_context(private_directory()))
        # Another forkserver of this process could not use a directory that is gone.
        self._directory.callback(configuration.pop, "tempdir", None)

    def _start(self, process: ForkServerProcess) -> None:
        """Start a process. Start another forkserver first if this one's socket has lost its name."""
        try:
            process.start()
        except (FileNotFoundError, ConnectionRefusedError):
            # The name lies in a temporary directory, which was emptied.
            self.end()
            self._make_directory()
            process.start()
