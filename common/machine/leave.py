"""The end of a process in which gRPC has run."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """Run the functions that wait for the process's end, write what was printed, and end the process at once.

    gRPC's threads may want the interpreter's lock at any time. An interpreter that ends lets such a thread exit in the
    middle of C++ code, and then the C library aborts the process: "exception not rethrown", and SIGABRT for the code.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 (the only way to run them without the end of the interpreter)
    for stream in (sys.stdout, sys.stderr):
        # Closed ones, and pipes that have no reader, take nothing more.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
