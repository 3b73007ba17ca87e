"""A file that is read again when it changes."""

import asyncio
from collections.abc import Callable
from typing import Never

import structlog

from unlatch.common.security.files import LOOK_SECONDS, State, content, state

log = structlog.get_logger()

# What is read in one go on the event loop.
_MOST_BYTES = 1024 * 1024


class FileError(Exception):
    """A file that cannot be taken; the message names it and says why, and quotes nothing of it: it may be a secret."""


class WatchedFile:
    """`take` is given the file's bytes, and raises ValueError for what it cannot take. Then the last ones hold."""

    def __init__(self, path: str, take: Callable[[bytes], None]) -> None:
        self._path = path
        self._take = take
        self._seen: State | None = None

    def load(self) -> None:
        """Take it for the first time. Raises FileError."""
        self._seen = state(self._path)
        try:
            self._take(content(self._path, _MOST_BYTES))
        except (OSError, ValueError) as error:
            raise FileError(f"{self._path}: {_reason(error)}") from None

    async def run(self) -> Never:
        """Take it again whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Take it again if it has changed."""
        now = state(self._path)
        if now == self._seen:
            return
        # Noted before it is read: what changes meanwhile is seen the next time.
        self._seen = now
        try:
            self._take(content(self._path, _MOST_BYTES))
        except (OSError, ValueError) as error:
            log.error("file is not taken; what it said before holds", path=self._path, message=_reason(error))
        else:
            log.info("file taken", path=self._path)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
