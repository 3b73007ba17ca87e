"""Logs: one JSON object a line, on stderr.

A thread writes the lines, so that logging never waits for the reader of stderr. Kernels print to the same stderr, and
one that prints faster than it is read would otherwise block the event loop at its next log line.
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
# Maximum lines that wait to be written. Further lines are dropped and counted.
_MAX_WAITING = 1000
# Maximum time that the end of a process waits for its last lines to be written.
_LAST_LINES_SECONDS = 0.5


def configure(process: str, level: str) -> None:
    """Configure all loggers of this process, structlog's and the standard library's. Call this once."""
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
    """stderr with a writer thread, so that a slow or missing reader does not affect the code that logs."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._waiting: deque[str] = deque()
        self._lost = 0
        self._there = threading.Event()
        self._ending = False
        # A daemon thread, which cannot block the end of the process; _end gives it a moment.
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._writer.start()
        atexit.register(self._end)

    def write(self, text: str, /) -> int:
        if len(self._waiting) < _MAX_WAITING:
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
        # Not through sys.stderr: the interpreter cannot end while a thread is inside it.
        line = text.encode(errors="replace")
        with suppress(OSError):
            while line:
                line = line[os.write(_STDERR, line) :]

    def _end(self) -> None:
        self._ending = True
        self._there.set()
        self._writer.join(_LAST_LINES_SECONDS)


def _named(process: str) -> structlog.types.Processor:
    """A processor that adds the process's name. A library may log from a thread without our context variables."""

    def name(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        return {"process": process, **event}

    return name
