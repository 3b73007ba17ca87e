"""A terminal in a mode that reads single keys, restored afterwards."""

import os
import select
import signal
import socket
import sys
import termios
import tty
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self


class Terminal:
    """A context in which keys arrive one by one, and SIGTERM exits in order. `wait` returns for every redraw."""

    def __init__(self) -> None:
        self._waking, self._woken = socket.socketpair()
        for end in (self._waking, self._woken):
            end.setblocking(False)
        self._stdin = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._was: list[Any] = []

    def __enter__(self) -> Self:
        if self._stdin is not None:
            self._was = termios.tcgetattr(self._stdin)
            tty.setcbreak(self._stdin)
        # A handler must be set, or else the signal does not reach the descriptor that `wait` watches.
        signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, lambda *_: None)
        signal.signal(signal.SIGTERM, _end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        if self._stdin is not None:
            termios.tcsetattr(self._stdin, termios.TCSADRAIN, self._was)

    def wake(self) -> None:
        """Ask for a redraw. May be called from any thread."""
        with suppress(BlockingIOError):
            self._waking.send(b"\0")

    def wait(self) -> str:
        """Wait for a key, a call of `wake` or a new window size. Returns the keys that were pressed."""
        watched = [self._woken, *([] if self._stdin is None else [self._stdin])]
        ready, _, _ = select.select(watched, (), ())
        if self._woken in ready:
            self._woken.recv(4096)
        if self._stdin is None or self._stdin not in ready:
            return ""
        # A terminal that is gone would be readable for ever, without a key: quit.
        return os.read(self._stdin, 64).decode(errors="replace") or "q"


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
