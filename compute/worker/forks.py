"""The kernels are imported, and workers forked: what a forkserver does once its interpreter is known to be fit.

A worker is a fork of this process, so `sys.path`, `sys.argv`, the working directory and all else are in the worker what
they were for the kernels' modules.
"""

import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from unlatch.compute.ipc.fork_frames import (
    FORK_FRAME_BYTES,
    Fork,
    Forked,
    Imported,
    NotForked,
    Reaped,
    decode_fork,
    encode,
)
from unlatch.compute.worker.interpreter_lock import locked_by


def serve(channel: socket.socket) -> NoReturn:
    """Import all kernels, then fork workers until the dispatcher closes the channel."""
    with locked_by() as modules:
        # It imports the loop of workers, NumPy and the kernels.
        from unlatch.compute.worker.entry import enter
    # Else each worker would print once more what modules have printed.
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(encode(Imported(tuple(modules))))
    _Forks(channel, enter).serve()
    # _exit, which threads that a module has left running do not hold up.
    os._exit(0)


class _Forks:
    """Fork workers, and report the end of each."""

    def __init__(self, channel: socket.socket, enter: Callable[[socket.socket, int, str, int], None]) -> None:
        self._channel = channel
        self._enter = enter
        # Pids by pidfds.
        self._workers: dict[int, int] = {}
        self._events = select.poll()
        self._events.register(channel, select.POLLIN)
        # A terminal's Ctrl-C is for the dispatcher; and workers are waited for here, whatever a module has set. Workers
        # get the modules' handlers back.
        ours = {signal.SIGINT: signal.SIG_IGN, signal.SIGCHLD: signal.SIG_DFL}
        self._handlers = {number: signal.signal(number, handler) for number, handler in ours.items()}

    def serve(self) -> None:
        """Fork and report until the dispatcher is gone."""
        while True:
            for descriptor, _ in self._events.poll():
                if descriptor in self._workers:
                    self._reap(descriptor)
                elif not self._receive():
                    return

    def _receive(self) -> bool:
        """Handle one frame. Returns False if there is none, because the dispatcher is gone."""
        # Closed on exec, so that no program that a kernel starts has a worker's channel.
        frame, descriptors, _, _ = socket.recv_fds(self._channel, FORK_FRAME_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not frame:
            return False
        worker_channel, dispatcher_alive = descriptors
        self._fork(decode_fork(frame), worker_channel, dispatcher_alive)
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _fork(self, fork: Fork, channel: int, dispatcher_alive: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._channel.send(encode(NotForked(fork.number, error.strerror or str(error))))
            return
        if not pid:
            self._become_worker(fork, channel, dispatcher_alive)
        # The pid is this worker's until it is waited for here.
        pidfd = os.pidfd_open(pid)
        self._workers[pidfd] = pid
        self._events.register(pidfd, select.POLLIN)
        socket.send_fds(self._channel, [encode(Forked(fork.number, pid))], [pidfd])

    def _reap(self, pidfd: int) -> None:
        self._events.unregister(pidfd)
        os.close(pidfd)
        pid, status = os.waitpid(self._workers.pop(pidfd), 0)
        self._channel.send(encode(Reaped(pid, os.waitstatus_to_exitcode(status))))

    def _become_worker(self, fork: Fork, channel: int, dispatcher_alive: int) -> NoReturn:
        """Leave the forkserver behind in its child, and run a worker."""
        code = 1
        try:
            self._channel.close()
            for pidfd in self._workers:
                os.close(pidfd)
            for number, handler in self._handlers.items():
                # None is a handler that is not Python's, and cannot be set again.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._enter(socket.socket(fileno=channel), dispatcher_alive, fork.kind, fork.max_reply_bytes)
            sys.stdout.flush()
            code = 0
        except BaseException:  # noqa: BLE001 (this process must not go on as a second forkserver)
            traceback.print_exc()
        finally:
            os._exit(code)
