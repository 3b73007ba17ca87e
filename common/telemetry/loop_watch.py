"""Measurement of an event loop's lag, and of its waits for the interpreter lock.

A timer is due every 50 ms. Its lag is the time that any event at that moment had to wait: the histogram
`unlatch_event_loop_lag_seconds`. A stalled loop runs no timer, so a scrape, which has a thread of its own, asks how
overdue the timer is now: `unlatch_event_loop_stalled_seconds`. gilknocker's threads ask for the lock from outside
Python and time the answer: `unlatch_gil_contention_ratio`.
"""

import asyncio
import atexit
import time
from typing import Self

from gilknocker import KnockKnock  # type: ignore[import-untyped]  # compiled, without stubs

from unlatch.common.telemetry.recorder import Recorder

INTERVAL_SECONDS = 0.05
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_WINDOW_SECONDS = 5.0
# Knock every millisecond for 10 ms, then rest. gilknocker rests twice between samples, which makes 16 samples a window
# and costs 0.2 % of a core. Fewer knocks cost little less and measure less well, since one wait is 5 ms (CPython's
# switch interval).
_KNOCK_MICROSECONDS = 1_000
_SAMPLE_MICROSECONDS = 10_000
_REST_MICROSECONDS = 150_000


class LoopWatch:
    """Watches the running loop between `start` and `close`, or during a `with` block.

    Call both on the loop's thread. `close` blocks it for 0.13 s, which gilknocker needs to stop, so call it after the
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
            "Seconds by which the event loop's timer is overdue now: more than a few ms mean a blocked loop.",
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
        """Begin to watch the running loop."""
        self._loop = asyncio.get_running_loop()
        self._window_ends = time.monotonic() + _WINDOW_SECONDS
        self._knocker = KnockKnock(_KNOCK_MICROSECONDS, _SAMPLE_MICROSECONDS, _REST_MICROSECONDS)
        self._knocker.start()
        # Registered after gilknocker's own handler (in start()), so that this one runs first: see _stop_knocking.
        atexit.register(self._stop_knocking)
        self._schedule()

    def close(self) -> None:
        """Stop watching. A second call has no effect."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop = None
        self._stop_knocking()
        atexit.unregister(self._stop_knocking)

    def stalled_seconds(self) -> float:
        """Seconds by which the timer is overdue; 0 if it is not, or without a watch. May be called from any thread."""
        return max(0.0, time.monotonic() - self._due) if self._timer is not None else 0.0

    def gil_contention(self) -> float:
        """The ratio of the last whole window, or of the first one so far. May be called from any thread."""
        knocker = self._knocker
        if self._contention is None:
            return float(knocker.contention_metric) if knocker is not None else 0.0
        return self._contention

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _schedule(self) -> None:
        assert self._loop is not None
        # Not loop.time(): uvloop's clock stands still during a callback, and counts in milliseconds.
        self._due = time.monotonic() + INTERVAL_SECONDS
        self._timer = self._loop.call_later(INTERVAL_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        self._lag.observe(max(0.0, now - self._due))
        if now >= self._window_ends and self._knocker is not None:
            self._contention = float(self._knocker.contention_metric)
            self._knocker.reset_contention_metric()  # 0.1 ms: its thread acknowledges without the lock
            self._window_ends = now + _WINDOW_SECONDS
        self._schedule()

    def _stop_knocking(self) -> None:
        """Stop gilknocker, and let its last thread end before the interpreter does.

        `stop` holds the lock and waits for the thread that starts samples, but not for a running sample, which may be
        asking for the lock. If the interpreter ended first, that would abort the process ("FATAL: exception not
        rethrown"). The pause lets the sample get the lock, notice the stop, and end.
        """
        knocker, self._knocker, self._contention = self._knocker, None, None
        if knocker is not None:
            knocker.stop()
            time.sleep(0.03)
