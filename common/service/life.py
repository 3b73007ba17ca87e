"""A service's life: start, serve, drain, stop; and who is told of it.

The first SIGTERM or SIGINT begins the drain: health says NOT_SERVING, calls in flight get `drain_seconds`, then the
process ends. A second signal ends it at once. A supervisor that asks for it (systemd's NOTIFY_SOCKET, see sd_notify(3))
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
    """When this process is to stop. To be made on the event loop."""

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
            # Everything that we started ends by our end: see die_with_parent and compute.worker.
            os._exit(128 + number)
        # First of all: a log that nobody reads any more must not stand between a signal and its effect.
        self._stop.set()
        log.info("draining", signal=signal.Signals(number).name)


def let_threads_give_way() -> None:
    """Have threads started from now on not interrupt others when they wake (SCHED_BATCH; docs/decisions/0007).

    gRPC's threads wake for every event, each time in the middle of what the event loop is doing. To be called before
    there are any; the loop's own thread takes it back with `go_first` once they are there.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def go_first() -> None:
    """Have the calling thread interrupt those that give way."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def notify_ready(notify_socket: str) -> None:
    """Tell a supervisor that the service serves. Without one (an empty address) nobody is told."""
    if notify_socket:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice, contextlib.suppress(OSError):
            notice.connect(notify_socket)
            notice.send(b"READY=1")


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when `parent` ends, however it does; end it now if that has happened."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
