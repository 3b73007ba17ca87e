"""Logs: one JSON object a line, on stderr."""

import io
import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog


def configure(process: str, level: str) -> None:
    """Have every logger of this process, structlog's and the standard library's, write so. Call it once."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Stderr())),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(_Stderr())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _named(process)],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Stderr(io.TextIOBase):
    """stderr, of which a reader that has gone must not become an error in whoever logs."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def _named(process: str) -> structlog.types.Processor:
    """A library may log from any thread, where the context is not ours."""

    def name(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        return {"process": process, **event}

    return name
