"""The forkserver: a process that has NumPy and the kernels loaded and does nothing but fork workers.

The forkserver is multiprocessing's own. It starts before any gRPC object exists, and the dispatcher never forks after;
a worker that it forks is up within milliseconds and shares its pages.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

from unlatch.compute.errors import StartError
from unlatch.compute.ipc.frames import PRELOAD_VARIABLE
from unlatch.compute.worker.entry import enter

# Every BLAS and OpenMP that NumPy may come with reads its own.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

# What any Linux grants; it counts the system's own bookkeeping too, about 0.8 KiB a frame.
_CHANNEL_BYTES = 208 * 1024


class Spawned(NamedTuple):
    """A new worker process: the dispatcher's end of its channel, and the process whose child it is."""

    process: ForkServerProcess
    channel: socket.socket
    parent: int


class ForkServer:
    """Starts worker processes. `blas_threads` is what each worker's NumPy may use, set before NumPy loads.

    `worker_memory_bytes` is what each may take beyond what it starts with; 0 for no limit.
    """

    def __init__(
        self, kernels: Sequence[str], blas_threads: int, max_reply_bytes: int, worker_memory_bytes: int
    ) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.max_reply_bytes = max_reply_bytes
        self._worker_memory_bytes = worker_memory_bytes
        # One thread, so that starts do not race in multiprocessing.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="spawn")
        # Workers hold the reading end, the dispatcher alone the writing end: when that is gone, so is the pipe.
        self._dispatcher_alive, self._held = os.pipe2(os.O_CLOEXEC)
        # The forkserver takes nothing but an environment and names of modules to preload. The environment stays as it
        # is set here: multiprocessing starts another forkserver by itself where one has died.
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(blas_threads)))
        os.environ[PRELOAD_VARIABLE] = ",".join(kernels)
        self._context.set_forkserver_preload(["unlatch.compute.worker.loop", "unlatch.compute.worker.entry"])
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
            arguments = (theirs, _Inherited(self._dispatcher_alive), self.max_reply_bytes, self._worker_memory_bytes)
            process = self._context.Process(target=enter, args=arguments)
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        # Room for what is said of all the calls of two Runs to a worker that listens to none of it.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)
        return Spawned(process, ours, self.pid)

    async def spawn_within(self, seconds: float, *, unfit: int = 0) -> Spawned:
        """The same, off the event loop. Raises StartError where there is none, or none in time: then it is ended."""
        loop = asyncio.get_running_loop()
        spawning = loop.run_in_executor(self._starter, partial(self.spawn, unfit=unfit))
        late = not (await asyncio.wait([spawning], timeout=seconds))[0]
        if late:
            # What blocks the thread that spawns ends with the forkserver.
            await asyncio.to_thread(self.end)
        try:
            return await spawning
        except BrokenPipeError as error:
            raise StartError("a worker ended as it was forked") from error
        except (OSError, EOFError) as error:
            why = f"the kernels were not loaded within worker_start_seconds={seconds:g}" if late else error
            raise StartError(f"a worker did not start: {why}", lasting=late) from error

    async def close(self) -> None:
        """Start no more workers, and end the forkserver."""
        self._starter.shutdown(wait=False, cancel_futures=True)
        # It would end with the dispatcher; but one that hangs in a kernel module's import does not notice.
        await asyncio.to_thread(self.end)


class _Inherited:
    """A descriptor of which the child gets its own copy: DupFd can be made only while the child is being started."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        return _itself, (DupFd(self._fd),)


def _itself(copy: object) -> object:
    return copy
