"""gRPC's own lines, as entries of our log: a line for each failed TLS handshake, for example.

gRPC's core writes to the stream `stderr` of C. Only this stream is replaced, by a pipe that a thread reads: descriptor
2 stays as it is for the processes that we start.
"""

import contextvars
import ctypes
import logging
import os
import re
import threading

import structlog

log = structlog.get_logger()

# E1130 02:38:16.611284   11602 add_port.cc:83] Failed to add port
_LINE = re.compile(r"[A-Z]\d{4} [\d:.]+ +\d+ (?P<place>[^ \]]+)\] (?P<message>.*)")
_MAX_CHARACTERS = 1000
_UNBUFFERED = 2


def log_grpc() -> None:
    """Log what gRPC writes in this process, from now on."""
    # Warnings of its Python part are of methods that a stop aborts.
    logging.getLogger("grpc").setLevel(logging.ERROR)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    # When the pipe is full, lines are lost, and none of gRPC's threads waits.
    os.set_blocking(writing, False)
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    stream = libc.fdopen(writing, b"w")
    libc.setvbuf(ctypes.c_void_p(stream), None, _UNBUFFERED, 0)
    ctypes.c_void_p.in_dll(libc, "stderr").value = stream
    # With the name of this process, which log entries of other threads would lack.
    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(_log_lines, reading), name="grpc log", daemon=True).start()


def _log_lines(reading: int) -> None:
    with open(reading, errors="replace") as lines:
        for line in lines:
            found = _LINE.match(line)
            place, message = found.groups() if found else ("", line.rstrip())
            log.warning("grpc", place=place, message=message[:_MAX_CHARACTERS])
