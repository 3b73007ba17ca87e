"""Files that are looked at for changes, every second, and then read whole."""

from pathlib import Path

LOOK_SECONDS = 1.0

# Device, inode, when it was changed and what it held, and its size.
State = tuple[int, int, int, int, int]


def state(path: str) -> State | None:
    """What changes when a file does, wherever links lead (Kubernetes swaps one); None where there is none."""
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size


def content(path: str, most_bytes: int) -> bytes:
    """What a file holds. Raises OSError, and ValueError when it holds more."""
    with Path(path).open("rb") as file:
        found = file.read(most_bytes + 1)
    if len(found) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    return found
