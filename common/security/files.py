"""Files that are checked for changes every second, and read whole."""

from pathlib import Path

LOOK_SECONDS = 1.0

# Device, inode, times of the last change and of the last write, and size.
State = tuple[int, int, int, int, int]


def state(path: str) -> State | None:
    """A value that changes when the file does, or a link to it (Kubernetes swaps one); None for a missing file."""
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size


def content(path: str, most_bytes: int) -> bytes:
    """A file's content. Raises OSError, or ValueError for a file that is too large."""
    with Path(path).open("rb") as file:
        found = file.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    return found
