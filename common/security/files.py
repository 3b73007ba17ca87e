"""Files that are checked for changes every second, and read whole."""

from pathlib import Path

LOOK_SECONDS = 1.0

# Device, inode, times of the last change and of the last write, and size.
_State = tuple[int, int, int, int, int]


class FileWatch:
    """Files that are read together. A change of any of them is seen once."""

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self._seen: tuple[_State | None, ...] | None = None

    def has_changed(self) -> bool:
        """Whether a file has changed since the last call; true at the first call.

        To be called before the files are read, so that a change during the read is seen the next time.
        """
        states = tuple(map(_state, self._paths))
        changed = states != self._seen
        self._seen = states
        return changed


def content(path: str, most_bytes: int) -> bytes:
    """A file's content. Raises OSError, or ValueError for a file that is too large."""
    with Path(path).open("rb") as file:
        found = file.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    return found


def _state(path: str) -> _State | None:
    """A value that changes when the file does, or a link to it (Kubernetes swaps one); None for a missing file."""
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size
