"""Setup of a worker process: its process group, its signals, its BLAS threads and its priority."""

import fcntl
import os
import signal
import sys

import numpy as np

_NICE, _NICE_WITH_LOOP = 10, 5


def become_worker(dispatcher_alive: int) -> None:
    """Turn a forked child into a worker that ends with the dispatcher.

    `dispatcher_alive` is the reading end of a pipe whose other end only the dispatcher holds.
    """
    # A process group of its own: a terminal's Ctrl-C is for the dispatcher, and processes that a kernel starts end
    # with the worker.
    os.setpgid(0, 0)
    # When the dispatcher is gone, for whatever reason, Linux sends SIGIO to the group. Its default action ends
    # even a worker that is deep in C code and holds the interpreter lock.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    # Opened again, since the receiver of the signal belongs to the open file: with a shared one, only the last worker
    # would get it.
    own = os.open(f"/proc/self/fd/{dispatcher_alive}", os.O_RDONLY | os.O_NONBLOCK)
    os.close(dispatcher_alive)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    signal.signal(signal.SIGINT, _pass_over)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        # A kernel's module may handle it. Else the service ignores it (common/service/early.py).
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _pass_over)
    # A kernel's prints belong in the log, and not in the output that a program reads from the service's stdout.
    os.dup2(2, 1)


def _pass_over(*_: object) -> None:
    """Do nothing. The signal is not ignored instead, because programs that a kernel starts would inherit that."""


def seed_random_states() -> None:
    """Seed the global random states that all workers inherit. Python and Numba seed theirs after each fork."""
    for module in ("numpy.random", "torch"):
        if module in sys.modules:
            sys.modules[module].seed()


def start_blas_threads() -> None:
    """Let BLAS start its threads and allocate their buffers: OpenBLAS ends the process if it is refused them later."""
    square = np.zeros((128, 128))
    square @ square


def give_way() -> None:
    """Lower the worker's priority, so that the loops that feed it come first. Called once the worker is ready."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def give_way_with_loop() -> None:
    """Lower the priority of a worker with an event loop: less than other workers', since many calls wait for it."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE_WITH_LOOP)
