"""One worker process, from its start to its end.

    forkserver forks          worker sends Loaded…, Ready      ──> on_frame
    send()   ── Run ──>       worker sends Done or Failed      ──> on_frame
    kill()   ── SIGKILL ──>   worker ends, this way or another ──> on_end(reason)

An end is an event: the pidfd becomes readable. (A sentinel alone would not do: when the forkserver dies, all its
children's sentinels fire although they live.) The reason follows once the forkserver has reaped the process.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess

import msgspec

from compute import wire

_REAPED_WITHIN_SECONDS = 0.5
# Loaded frames carry docstrings and are larger than any other; more than a datagram can hold is never received.
_RECEIVE_BYTES = 256 * 1024

Frame = wire.Loaded | wire.Ready | wire.Misfit | wire.Done | wire.Failed


class WorkerProcess:
    """A process that was started. `on_frame` and `on_end` are called on the event loop."""

    def __init__(
        self,
        process: ForkServerProcess,
        channel: socket.socket,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[str], None],
    ) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self._channel = channel
        self._pidfd = os.pidfd_open(self.pid)
        self._on_frame = on_frame
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._verdict = ""
        self._loop.add_reader(self._channel, self._readable)
        self._loop.add_reader(self._pidfd, self._ended)

    def send(self, frame: wire.Run | wire.Forget, descriptors: Sequence[int] = ()) -> None:
        """Send a frame. A worker whose socket takes none is beyond help and killed."""
        encoded = wire.encode(frame)
        try:
            if descriptors:
                socket.send_fds(self._channel, [encoded], descriptors)
            else:
                self._channel.send(encoded)
        except OSError as error:
            self.kill(f"its socket refuses frames: {error.strerror}")

    def kill(self, why: str) -> None:
        """End the worker and whatever it started. `on_end` follows."""
        self._verdict = self._verdict or why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _readable(self) -> None:
        try:
            frame = self._channel.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if not frame:
            # A worker that closed its socket can never answer again, whether it lives or not.
            self._loop.remove_reader(self._channel)
            self.kill("it closed its socket")
            return
        try:
            message = wire.decode_for_front(frame)
        except msgspec.DecodeError as error:
            self.kill(f"it sent a frame that is none: {error}")
            return
        self._on_frame(message)

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._channel)
        # What it said before it ended still counts.
        with contextlib.suppress(OSError, msgspec.DecodeError):
            while frame := self._channel.recv(_RECEIVE_BYTES):
                self._on_frame(wire.decode_for_front(frame))
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
        self._on_end(self._verdict or _reason(code))


def _reason(code: int | None) -> str:
    if code is None:
        return "it ended in a way that nobody saw"
    if code < 0:
        return f"{signal.Signals(-code).name} ended it"
    return f"it exited with code {code}"
