"""A service's life: start, serve, drain, stop; and notification of a supervisor.

The first SIGTERM or SIGINT begins the drain: health becomes NOT_SERVING, calls in flight get `drain_seconds`, and then
the process ends. A second signal ends it at once. A supervisor that sets NOTIFY_SOCKET, as systemd does (sd_notify(3)),
is told when the service is ready.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket

import structlog

log = structlog.get_logger()

_PR_SET_PDEATHSIG = 1


class Life:
    """Signal handling of this process. Create it on the event loop."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    async def until_stop(self) -> None:
        """Wait for the first signal."""
        await self._stop.wait()

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            # All processes that we started end with this one: see die_with_parent and compute.worker.
            os._exit(128 + number)
        # Before the log: a log that is not read must not delay the effect of a signal.
        self._stop.set()
        log.info("draining", signal=signal.Signals(number).name)


def let_threads_give_way() -> None:
    """Let threads started from now on not preempt others when they wake (SCHED_BATCH; docs/decisions/0007).

    gRPC's threads wake for every event, each time in the middle of the event loop's work. Call this before any thread
    starts; the loop's own thread reverts it with `go_first` once they have started.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def go_first() -> None:
    """Let the calling thread preempt threads that give way."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def notify_ready(notify_socket: str) -> None:
    """Tell a supervisor that the service serves. An empty address means that there is no supervisor."""
    if notify_socket:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice, contextlib.suppress(OSError):
            notice.connect(notify_socket)
            notice.send(b"READY=1")


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when `parent` ends. If it has ended already, exit now."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
