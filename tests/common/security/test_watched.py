"""A watched file: its contents are read again, and a file that cannot be read is reported."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.support.watching import until
from unlatch.common.errors import CertificateError
from unlatch.common.security import files, watched
from unlatch.common.security.certificates import Files, load
from unlatch.common.security.watched import FileError, WatchedFile


async def test_file_is_taken_whenever_it_has_changed(tmp_path: Path) -> None:
    """The file is taken once for each change. While it is gone the last contents hold, and the log says so once."""
    path, taken = tmp_path / "file", list[bytes]()
    path.write_bytes(b"first")
    file = WatchedFile("--file", str(path), taken.append)
    file.load()
    with capture_logs() as log:
        await file.look()
        path.unlink()
        await file.look()
        await file.look()
        path.write_bytes(b"second")
        await file.look()
        await file.look()
    assert taken == [b"first", b"second"]
    assert [(entry["log_level"], entry.get("message")) for entry in log] == [
        ("error", "No such file or directory"),
        ("info", None),
    ]


def test_file_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    """A file that is too large is refused at the start by its name, without reading more of it than is kept."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1024 * 1024 + 1)
    with pytest.raises(FileError, match=r"--file \S+file: larger than 1048576 bytes"):
        WatchedFile("--file", str(path), lambda _: None).load()


@pytest.fixture(params=["pipe", "device", "directory"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file that cannot be read as a whole, or would be waited for; and what is said of it."""
    path = tmp_path / "file"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path, "Is a directory" if request.param == "directory" else "not a regular file"


def test_file_that_is_not_regular_is_refused_at_the_start(odd: tuple[Path, str]) -> None:
    """A pipe without a writer would be waited for. The error names the setting, also of a certificate."""
    path, wanted = odd
    with pytest.raises(FileError, match=f"^--file {path}: {wanted}$"):
        WatchedFile("--file", str(path), lambda _: None).load()
    with pytest.raises(CertificateError, match=f"^--tls-cert {path}: {wanted}$"):
        load(Files(cert=str(path), names=("--tls-cert", "--tls-key", "--tls-ca")))


async def test_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """The last content stays in effect. The next regular file is taken."""
    path, taken = tmp_path / "file", list[bytes]()
    path.write_bytes(b"first")
    file = WatchedFile("--file", str(path), taken.append)
    file.load()
    path.unlink()
    os.mkfifo(path)
    with capture_logs() as log:
        await file.look()
    assert [entry["message"] for entry in log] == ["not a regular file"]
    path.unlink()
    path.write_bytes(b"second")
    await file.look()
    assert taken == [b"first", b"second"]


async def test_file_system_that_hangs_holds_up_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a file is read, for however long, the event loop goes on. The log names the file."""
    path, taken, reached, hangs = tmp_path / "file", list[bytes](), threading.Event(), threading.Event()

    def content(*_: object) -> bytes:
        reached.set()
        assert hangs.wait(60.0)
        return b"content"

    monkeypatch.setattr(watched, "content", content)
    monkeypatch.setattr(files, "_SLOW_SECONDS", 0.01)
    path.touch()
    looking = asyncio.create_task(WatchedFile("--file", str(path), taken.append).look())
    await until(reached.is_set, "it is being read")
    await until(lambda: caplog.messages, "the log names it")
    assert caplog.messages == [f"{path}: not read after 0.01 seconds"]
    assert taken == []
    hangs.set()
    await looking
    assert taken == [b"content"]
