"""Logs: one JSON object a line, on stderr, and no more than some lines a second of each kind (log_ration.py).

On a terminal, the lines are text for people.

A thread writes the lines, so that logging never waits for the reader of stderr. Kernels print to the same stderr, and
one that prints faster than it is read would otherwise block the event loop at its next log line.
"""

import atexit
import io
import logging
import os
import threading
from collections import deque
from typing import TextIO, cast

import structlog

from unlatch.common.telemetry.log_ration import LogRations

_STDERR = 2
# grpc.aio logs so, with a traceback, that an answer could not be sent because its caller has left.
_CALLER_LEFT = "ExecuteBatchError raised in core by servicer method"
# Maximum lines that wait to be written. Further lines are dropped and counted.
_MAX_WAITING = 1000
# Maximum time that the end of a process waits for its last lines to be written.
_LAST_LINES_SECONDS = 0.5


def configure(process: str, level: str) -> None:
    """Configure all loggers of this process, structlog's and the standard library's. Call this once."""
    shared: list[structlog.types.Processor] = [
        _named(process),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    render = _for_people() if os.isatty(_STDERR) else structlog.processors.JSONRenderer()
    stderr, rations = _Stderr(process), LogRations()
    structlog.configure(
        # First, because the others cost more than a line that is left out may.
        processors=[rations, *shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stderr)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stderr)
    handler.addFilter(rations)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_with_left_out, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: not record.getMessage().startswith(_CALLER_LEFT))


def _for_people() -> structlog.typing.Processor:
    """Return a renderer for terminals: the event, then its fields, with a traceback on the lines below."""
    plain = structlog.dev.plain_traceback
    return structlog.dev.ConsoleRenderer(colors=False, sort_keys=False, exception_formatter=plain)


class _Stderr(io.TextIOBase):
    """stderr with a writer thread, so that a slow or missing reader does not affect the code that logs."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._waiting: deque[str] = deque()
        self._lost = 0
        # Whether the last line was written in part, because the disk became full.
        self._torn = False
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
                self._lost += not self._say(self._waiting.popleft())
                if (lost := self._lost) and not self._waiting:
                    told = f'{{"process": "{self._process}", "event": "log lines were lost", "lines": {lost}}}\n'
                    self._lost -= lost if self._say(told) else 0

    def _say(self, text: str) -> bool:
        """Write a line, on a line of its own; returns whether it was written whole."""
        # Not through sys.stderr: the interpreter cannot end while a thread is inside it.
        line = whole = (b"\n" if self._torn else b"") + text.encode(errors="replace")
        try:
            while line:
                line = line[os.write(_STDERR, line) :]
        except OSError:
            self._torn |= line != whole
        else:
            self._torn = False
        return not line

    def _end(self) -> None:
        self._ending = True
        self._there.set()
        self._writer.join(_LAST_LINES_SECONDS)


def _with_left_out(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Add what the rations have noted on a line of the standard library."""
    return {**event, **event["_record"].left_out}


def _named(process: str) -> structlog.types.Processor:
    """A processor that adds the process's name."""

    def name(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        return {"process": process, **event}

    return name
