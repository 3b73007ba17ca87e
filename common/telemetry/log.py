"""Logs: one JSON object a line, on stderr.

Whoever logs never waits for whoever reads: a thread writes. Kernels print to the same stderr, so one that prints
faster than it is read would hold up the event loop at its next line.
"""

import atexit
import io
import logging
import os
import threading
from collections import deque
from contextlib import suppress
from typing import TextIO, cast

import structlog

_STDERR = 2
# What waits to be written while nobody reads. What comes then is lost, and counted.
_MOST_WAITING = 1000
# How long the end of a process waits for its last lines to be read.
_LAST_LINES_SECONDS = 0.5


def configure(process: str, level: str) -> None:
    """Have every logger of this process, structlog's and the standard library's, write so. Call it once."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer()
    stderr = _Stderr(process)
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stderr)),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _named(process)],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Stderr(io.TextIOBase):
    """stderr, of which a reader that is slow or gone must not become a fault of whoever logs."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._waiting: deque[str] = deque()
        self._lost = 0
        self._there = threading.Event()
        self._ending = False
        # Neither holds up the process's end: a daemon, which the end gives a moment.
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._writer.start()
        atexit.register(self._end)

    def write(self, text: str, /) -> int:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(text)
        else:
            self._lost += 1
        self._there.set()
        return len(text)

    def _write_all(self) -> None:
        while not self._ending or self._waiting:
            self._there.wait()
            self._there.clear()
            while self._waiting:
                self._say(self._waiting.popleft())
                if self._lost and not self._waiting:
                    lost, self._lost = self._lost, 0
                    self._say(f'{{"process": "{self._process}", "event": "log lines were lost", "lines": {lost}}}\n')

    @staticmethod
    def _say(text: str) -> None:
        # Not by sys.stderr: the interpreter does not end while a thread is in the middle of that.
        line = text.encode(errors="replace")
        with suppress(OSError):
            while line:
                line = line[os.write(_STDERR, line) :]

    def _end(self) -> None:
        self._ending = True
        self._there.set()
        self._writer.join(_LAST_LINES_SECONDS)


def _named(process: str) -> structlog.types.Processor:
    """A library may log from any thread, where the context is not ours."""

    def name(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        return {"process": process, **event}

    return name
