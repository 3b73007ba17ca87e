"""Whether an event loop is on time, and how much of it waits for the interpreter lock.

A timer is due every 50 ms. How late it runs is what any event that came at that moment waited: the histogram
`unlatch_event_loop_lag_seconds`. A loop that is stalled runs no timer, so a scrape, which has a thread of its own, asks
how overdue the timer is now: `unlatch_event_loop_stalled_seconds`. gilknocker's threads ask for the lock from outside
Python and time the answer: `unlatch_gil_contention_ratio`.
"""

import asyncio
import atexit
import time
from types import TracebackType
from typing import Self

from gilknocker import KnockKnock  # type: ignore[import-untyped]  # compiled, without stubs

from unlatch.common.telemetry.recorder import Recorder

INTERVAL_SECONDS = 0.05
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_WINDOW_SECONDS = 5.0
# Knock every millisecond for 10 ms, then rest: gilknocker rests twice between samples, which makes 16 samples a window
# and costs 0.2 % of a core. Knocking less often costs little less and tells less: one wait is 5 ms, CPython's switch
# interval.
_KNOCK_MICROSECONDS = 1_000
_SAMPLE_MICROSECONDS = 10_000
_REST_MICROSECONDS = 150_000


class LoopWatch:
    """Watches the running loop between `start` and `close`, or for as long as a `with` block lasts.

    Both are called on the loop's thread. `close` blocks it for 0.13 s, gilknocker's way of stopping: call it when the
    last call has been answered.
    """

    def __init__(self, recorder: Recorder, process: str) -> None:
        self._lag = recorder.histogram(
            "unlatch_event_loop_lag_seconds",
            "How late the event loop ran a timer that is due every 50 ms.",
            ("process",),
            LAG_BUCKETS,
        ).labels(process)
        recorder.gauge(
            "unlatch_event_loop_stalled_seconds",
            "How overdue the event loop's timer is now: more than a few milliseconds means that the loop is held up.",
            ("process",),
            lambda: {(process,): self.stalled_seconds()},
        )
        recorder.gauge(
            "unlatch_gil_contention_ratio",
            "Share of the last 5 s that a thread asking for the interpreter lock every millisecond spent waiting.",
            ("process",),
            lambda: {(process,): self.gil_contention()},
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._knocker: KnockKnock | None = None
        self._window_ends = 0.0
        self._contention: float | None = None

    def start(self) -> None:
        """Begin to watch the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._window_ends = time.monotonic() + _WINDOW_SECONDS
        self._knocker = KnockKnock(_KNOCK_MICROSECONDS, _SAMPLE_MICROSECONDS, _REST_MICROSECONDS)
        self._knocker.start()
        # After gilknocker's own, which it registered in start(), so that this one is called first: see _stop_knocking.
        atexit.register(self._stop_knocking)
        self._schedule()

    def close(self) -> None:
        """Stop watching; once is enough, twice does no harm."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop = None
        self._stop_knocking()
        atexit.unregister(self._stop_knocking)

    def stalled_seconds(self) -> float:
        """How overdue the timer is; 0 when it is not, or nothing is watched. From any thread."""
        return max(0.0, time.monotonic() - self._due) if self._timer is not None else 0.0

    def gil_contention(self) -> float:
        """The share of the last whole window, of the first one as far as it has come. From any thread."""
        knocker = self._knocker
        if self._contention is None:
            return float(knocker.contention_metric) if knocker is not None else 0.0
        return self._contention

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _schedule(self) -> None:
        assert self._loop is not None
        # Not loop.time(): uvloop's stands still while a callback runs, and counts in milliseconds.
        self._due = time.monotonic() + INTERVAL_SECONDS
        self._timer = self._loop.call_later(INTERVAL_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        self._lag.observe(max(0.0, now - self._due))
        if now >= self._window_ends and self._knocker is not None:
            self._contention = float(self._knocker.contention_metric)
            self._knocker.reset_contention_metric()  # 0.1 ms: its thread acknowledges, and never wants the lock
            self._window_ends = now + _WINDOW_SECONDS
        self._schedule()

    def _stop_knocking(self) -> None:
        """Stop gilknocker, and let its last thread go before the interpreter does.

        `stop` waits, holding the lock, for the thread that starts samples, and not for the sample itself, which may be
        asking for the lock. Once the interpreter has gone, that aborts the process ("FATAL: exception not rethrown").
        Here it gets the lock, sees that its time is over, and ends.
        """
        knocker, self._knocker, self._contention = self._knocker, None, None
        if knocker is not None:
            knocker.stop()
            time.sleep(0.03)
