"""One worker process, from its start to its end.

    forkserver forks          worker sends Loaded…, Ready      ──> on_frame
    send()   ── Run ──>       worker sends Done or Failed      ──> on_frame
    kill()   ── SIGKILL ──>   worker ends, this way or another ──> on_end(End)

An end is an event: the pidfd becomes readable. (A sentinel alone would not do: when the forkserver dies, all its
children's sentinels fire although they live.) The reason follows once the forkserver has reaped the process.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess

import msgspec
import structlog

from unlatch.compute.ipc import frames as wire
from unlatch.compute.pool import exits as ends
from unlatch.compute.pool.exits import End
from unlatch.compute.pool.stopped import Standstill

log = structlog.get_logger()

_REAPED_WITHIN_SECONDS = 0.5
# A process that ends closes its socket a moment before its pidfd tells. One that takes longer has closed nothing else.
_ENDS_WITHIN_SECONDS = 0.2
# Loaded frames carry docstrings and are larger than any other; more than a datagram can hold is never received.
_RECEIVE_BYTES = 256 * 1024


class WorkerProcess:
    """A process that was started. `on_frame` and `on_end` are called on the event loop."""

    def __init__(
        self,
        process: ForkServerProcess,
        channel: socket.socket,
        on_frame: Callable[[wire.ToDispatcher], None],
        on_end: Callable[[End], None],
        *,
        stopped_seconds: float = 0.0,
    ) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self._channel = channel
        self._pidfd = os.pidfd_open(self.pid)
        self._on_frame = on_frame
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._verdict: End | None = None
        self._grace: asyncio.TimerHandle | None = None
        # From the first sign of its end on: nothing more is to be given to it.
        self.ending = False
        self._loop.add_reader(self._channel, self._readable)
        self._loop.add_reader(self._pidfd, self._ended)
        self._standstill = Standstill(self.pid, stopped_seconds, self.kill)

    def send(self, frame: wire.ToWorker, fd: int | None = None) -> None:
        """Send a frame, with a descriptor or none. A worker whose socket takes none is beyond help and killed."""
        if self.ending:
            return
        encoded = wire.encode(frame)
        try:
            if fd is None:
                self._channel.send(encoded)
            else:
                socket.send_fds(self._channel, [encoded], [fd])
        except (BrokenPipeError, ConnectionResetError):
            self._hung_up()
        except OSError as error:
            self.kill(ends.DEAF.with_detail(error.strerror or str(error)))

    @property
    def cpu_seconds(self) -> float:
        """The processor time that it has used, all its threads together; 0 once it is gone."""
        try:
            # The system's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED): to the nanosecond, and without reading a file.
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    def kill(self, end: End) -> None:
        """End the worker and whatever it started. `on_end` follows, with the first end that it was given."""
        self._verdict = self._verdict or end
        self._hear_no_more()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def hear(self) -> None:
        """Take in what it has said already, though the loop has not come to it yet."""
        while not self.ending and self._readable():
            pass

    def _readable(self) -> bool:
        """Take in a frame. False where there is none."""
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
            message = wire.decode_for_dispatcher(frame)
        except msgspec.DecodeError as error:
            # The worker chooses what the error says: callers are not told, and the log has it no longer than this.
            log.warning("worker sent an undecodable frame", pid=self.pid, error=str(error)[:200])
            self.kill(ends.NO_FRAME)
            return False
        self._on_frame(message)
        return True

    def _hung_up(self) -> None:
        """Its end of the socket is closed, so it can never answer again: it ends now, or is ended."""
        self._hear_no_more()
        if self._grace is None:
            self._grace = self._loop.call_later(_ENDS_WITHIN_SECONDS, self.kill, ends.HUNG_UP)

    def _hear_no_more(self) -> None:
        if not self.ending:
            self.ending = True
            self._loop.remove_reader(self._channel)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._standstill.close()
        self._hear_no_more()
        if self._grace is not None:
            self._grace.cancel()
        # What it said before it ended still counts; of what it said after it was to be killed only that it did.
        with contextlib.suppress(OSError, msgspec.DecodeError):
            while frame := self._channel.recv(_RECEIVE_BYTES):
                if self._verdict:
                    self._verdict = replace(self._verdict, went_on=True)
                    break
                self._on_frame(wire.decode_for_dispatcher(frame))
        self._channel.close()
        self._timeout = self._loop.call_later(_REAPED_WITHIN_SECONDS, self._reaped)
        self._loop.add_reader(self._process.sentinel, self._reaped)

    def _reaped(self) -> None:
        self._timeout.cancel()
        self._loop.remove_reader(self._process.sentinel)
        code = self._process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self._pidfd)
        with contextlib.suppress(ValueError):  # not reaped within the time: the forkserver is in trouble itself
            self._process.close()
        self._on_end(self._verdict or ends.by_itself(code))
