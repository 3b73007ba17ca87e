"""Log lines: JSON for programs, text for people at a terminal."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

LINES = """
import structlog
from unlatch.common.telemetry.log import configure

configure("dispatcher", "info")
log = structlog.get_logger()
log.info("serving", listen="127.0.0.1:8001")
log.error("kernel failed", kernel="f", exception="1a2b Traceback\\n  File ...\\nNameError: y\\n")
"""

# A limit on the file's size stands for a disk that is full, and has room again later.
FULL_DISK = """
import resource
import structlog
from unlatch.common.telemetry.log import configure

configure("dispatcher", "info")
log = structlog.get_logger()
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))
for number in range(5):
    log.info("before", number=number)
import logging
writer = logging.getLogger().handlers[0].stream
while writer._waiting:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("after")
"""


def _logged(stderr: int) -> None:
    subprocess.run([sys.executable, "-c", LINES], stderr=stderr, check=True, timeout=60)


def test_terminal_gets_text_with_the_traceback_on_its_own_lines() -> None:
    """A developer under --reload reads the line of the fault without taking JSON apart."""
    ours, theirs = pty.openpty()
    _logged(theirs)
    os.close(theirs)
    shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    assert "serving" in shown
    assert "listen=127.0.0.1:8001" in shown
    assert "process=dispatcher" in shown
    assert "\nNameError: y\n" in shown
    assert "\033" not in shown


def test_other_readers_get_json() -> None:
    """Each line is one object, whatever its fields have in them."""
    ours, theirs = os.pipe()
    _logged(theirs)
    os.close(theirs)
    with os.fdopen(ours) as lines:
        served, failed = map(json.loads, lines)
    assert served["listen"] == "127.0.0.1:8001"
    assert failed["exception"].endswith("NameError: y\n")


@pytest.mark.parametrize("room", [0, 1, 150, 250])
def test_disk_that_was_full_leaves_whole_lines(tmp_path: Path, room: int) -> None:
    """A line that was written in part is ended, so the next one is whole, and lines that were lost are counted."""
    file = tmp_path / "log"
    with file.open("wb") as stderr:
        subprocess.run([sys.executable, "-c", FULL_DISK.format(room=room)], stderr=stderr, check=True, timeout=60)
    whole, torn = [], 0
    for line in file.read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn += 1
    lost = sum(line.get("lines", 0) for line in whole)
    events = [line["event"] for line in whole]
    assert "after" in events
    assert lost >= 1
    assert torn <= 1
    # Each line was written whole, or is counted.
    assert events.count("before") + events.count("after") + lost == 6
