"""The forkserver: a process that has NumPy and the kernels loaded and does nothing but fork workers.

It is multiprocessing's own. It starts before any gRPC object exists, and the front never forks after; a worker that
it forks is up within milliseconds and shares its pages.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any

from compute.entry import enter
from compute.wire import PRELOAD_VARIABLE

# Every BLAS and OpenMP that NumPy may come with reads its own.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class ForkServer:
    """Starts worker processes. `blas_threads` is what each worker's NumPy may use, set before NumPy loads."""

    def __init__(self, kernels: Sequence[str], blas_threads: int, max_reply_bytes: int) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.max_reply_bytes = max_reply_bytes
        # Workers hold the reading end, the front alone the writing end: when the front is gone, so is the pipe.
        self._front_alive, self._held = os.pipe2(os.O_CLOEXEC)
        # The forkserver takes nothing but an environment and names of modules to preload. The environment stays as it
        # is set here: multiprocessing starts another forkserver by itself where one has died.
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(blas_threads)))
        os.environ[PRELOAD_VARIABLE] = ",".join(kernels)
        self._context.set_forkserver_preload(["compute.worker", "compute.entry"])
        forkserver.ensure_running()

    @property
    def pid(self) -> int:
        """The forkserver's process; 0 when there is none."""
        server: Any = forkserver._forkserver  # noqa: SLF001 (it tells its pid in no other way)
        return server._forkserver_pid or 0  # noqa: SLF001

    def spawn(self) -> tuple[ForkServerProcess, socket.socket]:
        """A new worker process, and the front's end of its channel. Blocks for the milliseconds that a fork takes."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = (theirs, _Inherited(self._front_alive), self.max_reply_bytes)
            process = self._context.Process(target=enter, args=arguments)
            try:
                process.start()
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        return process, ours


class _Inherited:
    """A descriptor of which the child gets its own copy: DupFd can be made only while the child is being started."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        return _itself, (DupFd(self._fd),)


def _itself(copy: object) -> object:
    return copy
