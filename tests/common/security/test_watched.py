"""A watched file: its contents are read again, and a file that cannot be read is reported."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from unlatch.common.security.watched import FileError, WatchedFile


def test_file_is_taken_whenever_it_has_changed(tmp_path: Path) -> None:
    """The file is taken once for each change. While it is gone the last contents hold, and the log says so once."""
    path, taken = tmp_path / "file", list[bytes]()
    path.write_bytes(b"first")
    file = WatchedFile(str(path), taken.append)
    file.load()
    with capture_logs() as log:
        file.look()
        path.unlink()
        file.look()
        file.look()
        path.write_bytes(b"second")
        file.look()
        file.look()
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
    with pytest.raises(FileError, match=r"file: larger than 1048576 bytes"):
        WatchedFile(str(path), lambda _: None).load()
