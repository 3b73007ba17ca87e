"""The steps of coroutines: how much processor time each call uses, and which one blocks the event loop.

A task runs in steps: from one `await` that waits to the next. All tasks of an async worker are made by `Steps.task`,
so that the steps of a call's own task and of all tasks that it starts are counted for that call. A second thread looks
at the step that runs now. If it takes longer than `_LONG_SECONDS`, no other call of the worker can go on meanwhile:
the thread reports where the step stands, while it stands there.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from types import FrameType
from typing import Any

from unlatch.compute.ipc.frames import MAX_PLACE_CHARACTERS
from unlatch.compute.worker.catalogue import is_installed

_LONG_SECONDS = 0.1
# How often the thread looks, while calls are in flight.
_LOOK_SECONDS = 0.025


class RunningCall:
    """A call that an async worker runs: its number, its processor time, and whether it is cancelled."""

    __slots__ = ("cancelled", "cpu_nanoseconds", "number", "task", "wants_result")

    def __init__(self, number: int) -> None:
        self.number = number
        self.cpu_nanoseconds = 0
        self.cancelled = False
        # Whether the kernel still runs. A cancel comes too late for one that has returned.
        self.wants_result = True
        # None before its first step. A task that is cancelled before it would end without an answer.
        self.task: asyncio.Task[None] | None = None


# The call that a task belongs to. Tasks that a kernel starts inherit it.
running: ContextVar[RunningCall | None] = ContextVar("running", default=None)


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are counted for a call."""

    __slots__ = ("_call", "_coroutine", "_steps")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], call: RunningCall, steps: "Steps") -> None:
        self._coroutine = coroutine
        self._call = call
        self._steps = steps

    def send(self, value: Any) -> Any:
        return self._stepped(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._stepped(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        # cr_frame, cr_await and others, which asyncio and debuggers read.
        return getattr(self._coroutine, name)

    def _stepped(self, step: Callable[..., Any], *given: Any) -> Any:
        steps = self._steps
        # A step may run another task's step within it.
        outer = steps.now
        steps.now = self._call, time.monotonic()
        before = time.thread_time_ns()
        try:
            return step(*given)
        finally:
            self._call.cpu_nanoseconds += time.thread_time_ns() - before
            call, began = steps.now
            steps.now = outer
            if time.monotonic() - began > _LONG_SECONDS:
                # The thread could not look in time if the step also kept the interpreter lock.
                steps.report(call, began, getattr(self._coroutine, "cr_frame", None))
                steps.over(self._call)


class Steps:
    """Counts the steps of one event loop.

    `on_blocking` gets a call's number and a place, from any thread; `on_over` gets the number when the step has ended.
    """

    def __init__(self, on_blocking: Callable[[int, str], None], on_over: Callable[[int], None]) -> None:
        self._on_blocking = on_blocking
        self._on_over = on_over
        # Held while a step is reported, so that its end is never told before its beginning.
        self._reporting = threading.Lock()
        # The step that runs now: its call, and when it began. Replaced whole, since two threads read it.
        self.now: tuple[RunningCall | None, float] = (None, 0.0)
        self._reported = 0.0
        self._loop_thread = threading.get_ident()
        self._busy = threading.Event()
        self._thread = threading.Thread(target=self._look, name="unlatch-steps", daemon=True)
        self._thread.start()

    def task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **given: Any) -> "asyncio.Task[Any]":
        """Make a task of a coroutine: an event loop's task factory."""
        call = running.get()
        if call is not None and asyncio.iscoroutine(coroutine):
            coroutine = _Counted(coroutine, call, self)
        return asyncio.Task(coroutine, loop=loop, **given)

    def watch(self, *, busy: bool) -> None:
        """Let the thread look at steps from now on, or let it sleep."""
        if busy:
            self._busy.set()
        else:
            self._busy.clear()

    def report(self, call: RunningCall | None, began: float, frame: FrameType | None) -> None:
        """Report a long step, once."""
        with self._reporting:
            self._report(call, began, frame)

    def _report(self, call: RunningCall | None, began: float, frame: FrameType | None) -> None:
        if call is not None and self._reported != began:
            self._reported = began
            self._on_blocking(call.number, _place(frame))

    def over(self, call: RunningCall) -> None:
        """Tell that a long step has ended."""
        with self._reporting:
            self._on_over(call.number)

    def _look(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(_LOOK_SECONDS)
            self._look_once()

    def _look_once(self) -> None:
        # A frame keeps a kernel's arrays alive, so none is kept here.
        call, began = self.now
        if call is not None and time.monotonic() - began > _LONG_SECONDS:
            frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 (public by its documentation)
            with self._reporting:
                # Else the step has ended, and its end may have been told.
                if self.now == (call, began):
                    self._report(call, began, frame)


def _place(frame: FrameType | None) -> str:
    """Return file, line and function of the innermost frame in code of a kernel's author, else of the innermost."""
    own = frame
    while own is not None and is_installed(own.f_code.co_filename):
        own = own.f_back
    found = own or frame
    if found is None:
        return "an unknown line"
    return f"{found.f_code.co_filename}:{found.f_lineno} in {found.f_code.co_name}"[-MAX_PLACE_CHARACTERS:]
