"""A terminal that hears single keys, and is as it was afterwards."""

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
    """Within it keys come one by one, and SIGTERM is an orderly end. `wait` returns on whatever asks for a redraw."""

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
        # A handler there must be: only then does the signal reach the descriptor that `wait` looks at.
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
        """There is something to draw; from any thread."""
        with suppress(BlockingIOError):
            self._waking.send(b"\0")

    def wait(self) -> str:
        """Until a key is pressed, or somebody wakes it, or the window has another size: the keys that were pressed."""
        watched = [self._woken, *([] if self._stdin is None else [self._stdin])]
        ready, _, _ = select.select(watched, (), ())
        if self._woken in ready:
            self._woken.recv(4096)
        if self._stdin is None or self._stdin not in ready:
            return ""
        # A terminal that is gone has nothing more to say, for ever.
        return os.read(self._stdin, 64).decode(errors="replace") or "q"


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
