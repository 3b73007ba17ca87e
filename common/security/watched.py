"""A file that is read again when it changes."""

import asyncio
from collections.abc import Callable
from typing import Never

import structlog

from unlatch.common.security.files import LOOK_SECONDS, FileWatch, content, read_apart

log = structlog.get_logger()

# Bound of a file, since its content is taken at once on the event loop.
_MAX_BYTES = 1024 * 1024


class FileError(Exception):
    """A file that cannot be used. The message names it and the fault, but quotes nothing: it may hold a secret."""


class WatchedFile:
    """Passes the bytes of the file of a setting, `flag`, to `take`.

    If `take` raises ValueError, the last valid content stays in effect.
    """

    def __init__(self, flag: str, path: str, take: Callable[[bytes], None]) -> None:
        self._flag = flag
        self._path = path
        self._take = take
        self._watch = FileWatch(path)

    def load(self) -> None:
        """Read the file for the first time. Raises FileError."""
        self._watch.has_changed()
        try:
            self._take(content(self._path, _MAX_BYTES))
        except (OSError, ValueError) as error:
            raise FileError(f"{self._flag} {self._path}: {_reason(error)}") from None

    async def run(self) -> Never:
        """Read the file again whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Read the file again if it has changed."""
        try:
            found = await read_apart(self._path, self._changed)
            if found is None:
                return
            self._take(found)
        except Exception as error:  # noqa: BLE001 (with any fault the file is read again when it changes)
            log.error("file not replaced, old content stays", path=self._path, message=_reason(error))
        else:
            log.info("file replaced", path=self._path)

    def _changed(self) -> bytes | None:
        """The content of the file if it has changed."""
        return content(self._path, _MAX_BYTES) if self._watch.has_changed() else None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    # The text of any other exception may quote the file.
    return str(error) if isinstance(error, ValueError) else type(error).__name__
