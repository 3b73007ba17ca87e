"""A service's life: start, serve, drain, stop; and notification of a supervisor.

The first SIGTERM, SIGINT or SIGHUP begins the drain: health becomes NOT_SERVING, calls in flight get `drain_seconds`,
and then the process ends. During the start it ends the start. A second signal ends the process at once. (SIGHUP has
nothing to read again, since files are read again when they change. It comes when a terminal is closed.) A supervisor
that sets NOTIFY_SOCKET, as systemd does (sd_notify(3)), is told when the service is ready, and when it stops.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Coroutine

import structlog

from unlatch.common.service.early import stop_signals

log = structlog.get_logger()


class Life:
    """Signals of this process, and what its supervisor is told. Create it in the task that starts the service.

    A signal during the start cancels that task. A second signal calls `end_others` and ends this process.
    """

    def __init__(self, notify_socket: str, end_others: Callable[[], None] = lambda: None) -> None:
        # In systemd's notation, a name in a namespace of this machine begins with @.
        self._notify_socket = notify_socket.replace("@", "\0", 1) if notify_socket.startswith("@") else notify_socket
        self._end_others = end_others
        self._stop = asyncio.Event()
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._signalled, number)

    def until_stop(self) -> Coroutine[object, object, object]:
        """Wait for the first signal. The start is over: no signal cancels its task any more."""
        self._starting = None
        return self._stop.wait()

    def ready(self) -> None:
        """Tell the supervisor, if there is one, that the service serves."""
        self._notify(b"READY=1")

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            # All processes that we started end with this one: see die_with_parent and compute.worker.
            self._end_others()
            os._exit(128 + number)
        # Before the log: a log that is not read must not delay the effect of a signal.
        self._stop.set()
        if self._starting is not None:
            self._starting.cancel()
        self._notify(b"STOPPING=1")
        log.info("draining", signal=signal.Signals(number).name)

    def _notify(self, state: bytes) -> None:
        if self._notify_socket:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice, contextlib.suppress(OSError):
                notice.setblocking(False)
                notice.connect(self._notify_socket)
                notice.send(state)


def let_threads_give_way() -> None:
    """Let threads started from now on not preempt others when they wake (SCHED_BATCH; docs/decisions/0007).

    gRPC's threads wake for every event, each time in the middle of the event loop's work. Call this before any thread
    starts; the loop's own thread reverts it with `go_first` once they have started.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def go_first() -> None:
    """Let the calling thread preempt threads that give way."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
