"""Files that are checked for changes every second, and read whole."""

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypeVar

# Not structlog: clients read certificates too, and their program configures logging.
_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
# After this time the log names a file that has not been read.
_SLOW_SECONDS = 5.0

Read = TypeVar("Read")

# Device, inode, times of the last change and of the last write, and size.
FileState = tuple[int, int, int, int, int]


class FileWatch:
    """Files that are read together. A change of any of them is seen once."""

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self._seen: tuple[FileState | None, ...] | None = None

    def has_changed(self) -> bool:
        """Whether a file has changed since the last call; true at the first call.

        To be called before the files are read, so that a change during the read is seen the next time.
        """
        states = tuple(map(file_state, self._paths))
        changed = states != self._seen
        self._seen = states
        return changed


def content(path: str, most_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError, or ValueError for any other file and for one that is too large.

    A pipe or a device is not waited for. Its content could not be read again.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        found = file.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    return found


async def read_apart(path: str, read: Callable[[], Read]) -> Read:
    """Run a function that reads a file in a thread of its own, and return its result.

    A file system that hangs holds up nothing else: not the event loop, no other file, and not the end of the process.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Read] = loop.create_future()
    Thread(target=_run, args=(loop, result, read), name="file", daemon=True).start()
    slow = loop.call_later(_SLOW_SECONDS, _log.warning, "%s: not read after %g seconds", path, _SLOW_SECONDS)
    try:
        return await result
    finally:
        slow.cancel()


def _run(loop: asyncio.AbstractEventLoop, result: "asyncio.Future[Read]", read: Callable[[], Read]) -> None:
    try:
        finish = partial(result.set_result, read())
    except Exception as error:  # noqa: BLE001 (raised where the result is awaited)
        finish = partial(result.set_exception, error)
    # The loop may be closed by now.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(_finish, result, finish)


def _finish(result: "asyncio.Future[Read]", finish: Callable[[], None]) -> None:
    if not result.done():
        finish()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def file_state(path: str) -> FileState | None:
    """A value that changes when the file does, or a link to it (Kubernetes swaps one); None for a missing file."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size
