"""A file that is read again: what is taken of it, and what is said when it cannot be."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from unlatch.common.security.watched import FileError, WatchedFile


def test_file_is_taken_whenever_it_has_changed(tmp_path: Path) -> None:
    """Once a change; what was taken last holds while the file is gone, of which the log tells once."""
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
    """By its name, and without reading more of it than is held."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1024 * 1024 + 1)
    with pytest.raises(FileError, match=r"file: larger than 1048576 bytes"):
        WatchedFile(str(path), lambda _: None).load()
