"""A worker process, from its start to its exit.

    forkserver forks          worker sends Loaded…, Ready       ──> on_frame
    send()   ── RunFrame ──>  worker sends Done or Failed       ──> on_frame
    kill()   ── SIGKILL ──>   worker exits, this way or another ──> on_exit(Exit)

An exit is an event: the pidfd becomes readable. The reason of an exit follows once the forkserver has reaped the
process, or is never known if the forkserver has ended.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import msgspec
import structlog

from unlatch.common.machine.process_states import RUNNABLE, state_in
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.ipc.frames import End, ToDispatcher, ToWorker, decode_for_dispatcher, encode
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.forkserver import Spawned
from unlatch.compute.pool.stopped import StoppedWatch

log = structlog.get_logger()

_REAPED_WITHIN_SECONDS = 0.5
# A process that ends closes its socket a moment before its pidfd becomes readable. A process that lives on for
# longer than this is not ending, and is killed.
_ENDS_WITHIN_SECONDS = 0.2
# The largest frames are Loaded frames, which carry docstrings. A datagram of the default socket buffer is smaller.
_RECEIVE_BYTES = 256 * 1024


class WorkerProcess:
    """A process that was started. `on_frame` and `on_exit` are called on the event loop, and raise nothing.

    `queues` lets frames wait here if the socket has no room for them, as for a worker that has many runs.
    """

    def __init__(
        self,
        spawned: Spawned,
        on_frame: Callable[[ToDispatcher], None],
        on_exit: Callable[[Exit], None],
        *,
        errors: InternalErrors,
        stopped_seconds: float = 0.0,
        queues: bool = False,
    ) -> None:
        self.pid = spawned.pid
        self._channel = spawned.channel
        self._pidfd = spawned.pidfd
        self._exit_code = spawned.exit_code
        self._on_frame = on_frame
        self._on_exit = on_exit
        self._errors = errors
        self._loop = asyncio.get_running_loop()
        self._cause: Exit | None = None
        self._grace: asyncio.TimerHandle | None = None
        # True from the first sign of the worker's end on. It is sent nothing more.
        self.ending = False
        self._gone = False
        # Seconds that the worker's teardowns may take; 0 if it has none.
        self.teardown_seconds = 0.0
        self._queues = queues
        # Frames that the socket has had no room for, with descriptors of their own.
        self._unsent: deque[tuple[bytes, int | None]] = deque()
        self._loop.add_reader(self._channel, self._readable)
        self._loop.add_reader(self._pidfd, self._ended)
        self._stopped = StoppedWatch(self.pid, stopped_seconds, self.kill)

    def send(self, frame: ToWorker, fd: int | None = None) -> None:
        """Send a frame, with a descriptor or none. If the socket refuses the frame, queue it or kill the worker."""
        if self.ending:
            return
        encoded = encode(frame)
        if self._unsent or not self._sent(encoded, fd):
            if not self._unsent:
                self._loop.add_writer(self._channel, self._writable)
            # The descriptor's owner may close it before the frame is sent.
            self._unsent.append((encoded, None if fd is None else os.dup(fd)))

    def _sent(self, encoded: bytes, fd: int | None) -> bool:
        """Send a frame. Returns whether it has left, or is lost because the worker ends."""
        try:
            if fd is None:
                self._channel.send(encoded)
            else:
                socket.send_fds(self._channel, [encoded], [fd])
        except (BrokenPipeError, ConnectionResetError):
            self._hung_up()
        except OSError as error:
            if self._queues and isinstance(error, BlockingIOError):
                return False
            self.kill(exits.DEAF.with_detail(error.strerror or str(error)))
        return True

    def _writable(self) -> None:
        while self._unsent and self._sent(*self._unsent[0]):
            # Empty already if the worker ends.
            if self._unsent:
                _close(self._unsent.popleft()[1])
        if not self._unsent and not self.ending:
            self._loop.remove_writer(self._channel)

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds that the worker has used, all its threads together; 0 once it is gone."""
        try:
            # The system's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED): to the nanosecond, and without reading a file.
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    @property
    def waits_for_core(self) -> bool:
        """Whether the worker's main thread is ready to run now, and so may have had no core."""
        with contextlib.suppress(OSError):
            stat = os.open(f"/proc/{self.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return state_in(stat) == RUNNABLE
            finally:
                os.close(stat)
        return False

    def kill(self, cause: Exit) -> None:
        """Kill the worker and all that it started. `on_exit` follows, with the first cause that was given."""
        if self._gone:
            # Another process may have its number.
            return
        self._cause = self._cause or cause
        self._hear_no_more()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def end(self, cause: Exit) -> None:
        """End a worker that has no run: let it run its teardowns if it has some, then kill it."""
        if not self.teardown_seconds or self.ending:
            self.kill(cause)
            return
        self.send(End())
        self._cause = self._cause or cause
        self._hear_no_more()
        self._grace = self._loop.call_later(self.teardown_seconds, self.kill, cause)

    def hear(self) -> None:
        """Handle the frames that have arrived and that the event loop has not read yet."""
        while not self.ending and self._readable():
            pass

    def _readable(self) -> bool:
        """Read one frame and handle it. Returns False if there is none, or if the worker is killed for it."""
        try:
            frame = self._channel.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            frame = b""
        if not frame:
            self._hung_up()
            return False
        try:
            message = decode_for_dispatcher(frame)
        except msgspec.DecodeError as error:
            # The worker chooses the error's text. So no caller gets it, and the log gets only its beginning.
            log.warning("worker sent an undecodable frame", pid=self.pid, error=str(error)[:200])
            self.kill(exits.NO_FRAME)
            return False
        self._on_frame(message)
        return True

    def _hung_up(self) -> None:
        """Handle a closed socket: the worker can no longer answer, so it exits now or is killed."""
        self._hear_no_more()
        if self._grace is None:
            self._grace = self._loop.call_later(_ENDS_WITHIN_SECONDS, self.kill, exits.HUNG_UP)

    def _hear_no_more(self) -> None:
        if not self.ending:
            self.ending = True
            self._loop.remove_reader(self._channel)
            if self._unsent:
                self._loop.remove_writer(self._channel)
                while self._unsent:
                    _close(self._unsent.popleft()[1])

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        # `on_exit` must be called even if this raises.
        with self._errors.guarded("worker_exit"):
            self._hear_the_last()
        self._channel.close()
        self._timeout = self._loop.call_later(_REAPED_WITHIN_SECONDS, self._reaped)
        self._exit_code.add_done_callback(lambda _: self._reaped())

    def _hear_the_last(self) -> None:
        """Handle the frames that the worker sent before it exited. If it was killed, its frames are not handled.

        Then a frame only shows that the worker may have begun its next run.
        """
        self._stopped.close()
        self._hear_no_more()
        if self._grace is not None:
            self._grace.cancel()
        with contextlib.suppress(OSError, msgspec.DecodeError):
            while frame := self._channel.recv(_RECEIVE_BYTES):
                if self._cause:
                    self._cause = replace(self._cause, may_have_begun_next=True)
                    break
                self._on_frame(decode_for_dispatcher(frame))

    def _reaped(self) -> None:
        """Report the exit: its code is known, or the forkserver itself does not respond."""
        if self._gone:
            return
        self._timeout.cancel()
        self._gone = True
        with self._errors.guarded("worker_exit"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.close(self._pidfd)
        self._on_exit(self._cause or exits.by_itself(self._exit_code.result() if self._exit_code.done() else None))


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
