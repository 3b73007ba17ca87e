"""A file that is read again when it changes."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger()

_LOOK_SECONDS = 1.0
# What is read in one go on the event loop.
_MOST_BYTES = 1024 * 1024
# Which file this is and which of its contents: a name may come to mean another (Kubernetes swaps a symbolic link).
_State = tuple[int, int, int, int]


class FileError(Exception):
    """A file that cannot be taken; the message names it and says why, and quotes nothing of it: it may be a secret."""


class WatchedFile:
    """`take` is given the file's bytes, and raises ValueError for what it cannot take. Then the last ones hold."""

    def __init__(self, path: str, take: Callable[[bytes], None]) -> None:
        self._path = Path(path)
        self._take = take
        self._seen: _State | None = None

    def load(self) -> None:
        """Take it for the first time. Raises FileError."""
        try:
            self._seen = self._state()
            self._take(self._read())
        except (OSError, ValueError) as error:
            raise FileError(f"{self._path}: {_reason(error)}") from None

    async def run(self) -> None:
        """Take it again whenever it has changed, for ever."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Take it again if it has changed."""
        try:
            seen = self._state()
            if seen == self._seen:
                return
            self._seen = seen
            self._take(self._read())
        except (OSError, ValueError) as error:
            if self._seen is not None or not isinstance(error, OSError):
                log.error("file is not taken; what it said before holds", path=str(self._path), reason=_reason(error))
            if isinstance(error, OSError):
                # Once is enough to be told that it is not there.
                self._seen = None
        else:
            log.info("file taken", path=str(self._path))

    def _state(self) -> _State:
        stat = self._path.stat()
        return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        return content


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
