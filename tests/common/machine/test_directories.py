"""Directories for sockets: locked while their process lives, and removed by the next one if it was killed."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from unlatch.common.machine.directories import private_directory

_KILLED = """
import os, signal
from unlatch.common.machine.directories import private_directory
with private_directory() as directory:
    print(directory, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of temporary files, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="base-") as base:
        monkeypatch.setattr(tempfile, "tempdir", base)
        yield Path(base)


def bound(path: Path) -> socket.socket:
    """Bind a socket to a path."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    return made


def test_directory_of_a_killed_process_is_removed(base: Path) -> None:
    """The next process removes it with the sockets in it, and its own at the end."""
    killed = subprocess.run(
        (sys.executable, "-c", _KILLED), env={**os.environ, "TMPDIR": str(base)}, stdout=subprocess.PIPE, check=False
    )
    left = Path(killed.stdout.decode().strip())
    assert left.parent == base
    bound(left / "unit.notify").close()
    with private_directory() as directory:
        assert list(base.iterdir()) == [directory]
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not list(base.iterdir())


def test_emptied_directory_stays_locked(base: Path) -> None:
    """A cleaner of temporary files that empties the directory of a live process does not make it another's."""
    with private_directory() as directory:
        bound(directory / "lanes-0").close()
        for file in directory.iterdir():
            file.unlink()
        with private_directory():
            assert directory.exists()


def test_directory_that_was_made_again_is_kept(base: Path) -> None:
    """A live process whose directory was removed has made another one, for its sockets."""
    again = base / "unlatch-12345678"
    again.mkdir(mode=0o700)
    with bound(again / "unit.notify"), private_directory():
        assert again.exists()
    with private_directory():
        assert not again.exists()


def test_other_directories_are_kept(base: Path) -> None:
    """A directory that holds files, others may read, or has another name is no directory for sockets."""
    mine = [base / name for name in ("unlatch-mine", "unlatch-notebook", "unlatch-holidays", "unlatch-pictures")]
    for directory in mine:
        directory.mkdir(mode=0o700)
    (mine[1] / "work.py").touch()
    mine[2].chmod(0o755)
    target = base / "target"
    target.mkdir(mode=0o700)
    mine[3].rmdir()
    mine[3].symlink_to(target)
    with private_directory():
        assert all(directory.exists() for directory in (*mine, target))


@pytest.mark.parametrize("name", ["a,b", "a%b", "a?b", "a#b", "d" * 84])
def test_directory_without_addresses_is_not_used(base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where gRPC could not give a socket an address, /tmp is used."""
    odd = base / name
    odd.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    with private_directory() as directory:
        assert directory.parent == Path("/tmp")
    assert not list(odd.iterdir())


def test_one_process_has_several(base: Path) -> None:
    """Directories of the same process do not remove each other."""
    with ExitStack() as stack:
        made = [stack.enter_context(private_directory()) for _ in range(3)]
        assert all(directory.exists() for directory in made)
    assert not list(base.iterdir())
