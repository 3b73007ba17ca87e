"""Directories of one process each, for its sockets, in the directory of temporary files.

A process keeps its directory locked as long as it lives. A killed process leaves its directory behind, unlocked, and
the next process that needs a directory removes it. systemd-tmpfiles(8) leaves locked directories alone, too.
"""

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

from unlatch.common.errors import DirectoryError

_PREFIX = "unlatch-"
# Bytes of a socket's path (unix(7)), and the longest that a path may become within a directory from here.
_MAX_SOCKET_BYTES = 107
_SOCKET_BYTES = len("/unlatch-12345678/listener-12345678")
# gRPC takes an address for a URI, and a comma in it for the end of one of several addresses.
_NOT_IN_AN_ADDRESS = re.compile(r"[,%?#]")


@contextmanager
def private_directory() -> Iterator[Path]:
    """Make a directory of this process that no other user can read, and remove it at the end. Raises DirectoryError.

    Directories of processes that were killed are removed first.
    """
    try:
        base = _base()
        _remove_left_over(base)
        directory, held = _locked(base)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise DirectoryError(f"no temporary directory ({why}): set TMPDIR to one that this user may write to") from None
    try:
        yield directory
    finally:
        rmtree(directory, ignore_errors=True)
        os.close(held)


def _base() -> str:
    """The directory of temporary files; /tmp if sockets in it could not have an address."""
    base = tempfile.gettempdir()
    fits = len(os.fsencode(base)) + _SOCKET_BYTES <= _MAX_SOCKET_BYTES and not _NOT_IN_AN_ADDRESS.search(base)
    return base if fits else "/tmp"  # noqa: S108 (mkdtemp)


def _locked(base: str) -> tuple[Path, int]:
    """Make a directory and lock it. Returns it, and the descriptor that keeps it locked."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        # Before it is locked, another process may take it for one that is left over.
        with suppress(FileNotFoundError):
            held = _lock(directory, wait=True)
            if directory.exists():
                return directory, held
            os.close(held)


def _lock(directory: Path, *, wait: bool) -> int:
    """Lock a directory, and return the descriptor that keeps it locked. Raises OSError."""
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(held)
        raise
    return held


def _remove_left_over(base: str) -> None:
    sockets = Path("/proc/net/unix").read_text(errors="replace")
    for directory in Path(base).glob(f"{_PREFIX}????????"):
        # Any error means that the directory belongs to a live process, to another user, or is gone.
        with suppress(OSError):
            held = _lock(directory, wait=False)
            try:
                # A supervisor whose directory was removed has made another one, which is not locked.
                if _is_ours(directory) and f" {directory}/" not in sockets:
                    rmtree(directory)
            finally:
                os.close(held)


def _is_ours(directory: Path) -> bool:
    """Whether a directory can be one that `_locked` has made: this user's alone, and with sockets at most."""
    state = directory.lstat()
    private = (state.st_uid, stat.S_IMODE(state.st_mode)) == (os.getuid(), 0o700)
    return private and all(stat.S_ISSOCK(file.lstat().st_mode) for file in directory.iterdir())
