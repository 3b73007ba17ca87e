"""A file that is read again when it changes."""

import asyncio
from collections.abc import Callable
from typing import Never

import structlog

from unlatch.common.security.files import LOOK_SECONDS, FileWatch, content

log = structlog.get_logger()

# Bound of a file, since it is read at once on the event loop.
_MAX_BYTES = 1024 * 1024


class FileError(Exception):
    """A file that cannot be used. The message names it and the fault, but quotes nothing: it may hold a secret."""


class WatchedFile:
    """Passes a file's bytes to `take`. If `take` raises ValueError, the last valid content stays in effect."""

    def __init__(self, path: str, take: Callable[[bytes], None]) -> None:
        self._path = path
        self._take = take
        self._watch = FileWatch(path)

    def load(self) -> None:
        """Read the file for the first time. Raises FileError."""
        self._watch.has_changed()
        try:
            self._take(content(self._path, _MAX_BYTES))
        except (OSError, ValueError) as error:
            raise FileError(f"{self._path}: {_reason(error)}") from None

    async def run(self) -> Never:
        """Read the file again whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Read the file again if it has changed."""
        if not self._watch.has_changed():
            return
        try:
            self._take(content(self._path, _MAX_BYTES))
        except Exception as error:  # noqa: BLE001 (with any fault the file is read again when it changes)
            log.error("file not replaced, old content stays", path=self._path, message=_reason(error))
        else:
            log.info("file replaced", path=self._path)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    # The text of any other exception may quote the file.
    return str(error) if isinstance(error, ValueError) else type(error).__name__
