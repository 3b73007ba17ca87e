"""gRPC's own lines are entries of the log, bounded, and the processes that we start keep their stderr."""

import json
import subprocess
import sys
from typing import Any

from tests.support.mesh import ROOT

PROGRAM = """\
import logging, os, subprocess, time
from contextlib import suppress
os.environ["GRPC_VERBOSITY"] = "ERROR"
from unlatch.common.service import grpc_log
from unlatch.common.telemetry import log_ration
from unlatch.common.telemetry.log import configure

now, lines, log = 1000.0, 0, grpc_log.log

class Counted:
    def warning(self, *given, **fields):
        global lines
        log.warning(*given, **fields)
        lines += 1

log_ration.monotonic, grpc_log.log = lambda: now, Counted()
configure("tested", "info")
grpc_log.log_grpc()
import grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
port = server.add_insecure_port("127.0.0.1:0")

def fail():
    before = lines
    with suppress(RuntimeError):
        server.add_insecure_port(f"127.0.0.1:{{port}}")
    while lines == before:
        time.sleep(0.001)

for _ in range({failures}):
    fail()
now += 1.2
fail()
subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
while logging.getLogger().handlers[0].stream._waiting:
    time.sleep(0.001)
"""


def logged(failures: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a program in which gRPC fails so many times, and once more later. Returns log entries and other lines.

    The program waits until a line is taken before it makes the next one, and moves the clock of the log itself.
    """
    program = PROGRAM.format(failures=failures)
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = ran.stderr.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")], [
        line for line in lines if not line.startswith("{")
    ]


def test_lines_of_grpc_are_entries() -> None:
    """A line of gRPC becomes an entry with the process and the line's place; a child's stderr is left alone."""
    entries, others = logged(1)
    assert others == ["from a child"]
    assert len(entries) == 2
    for entry in entries:
        assert (entry["event"], entry["process"], entry.get("left_out", 0)) == ("grpc", "tested", 0)
        assert entry["place"].startswith("add_port.cc:")
        assert "Address already in use" in entry["message"]


def test_flood_of_lines_is_bounded() -> None:
    """Of many lines in a second some are written; the next one says how many were left out."""
    entries, _ = logged(200)
    assert 10 <= len(entries) <= 40
    assert sum(entry.get("left_out", 0) for entry in entries) == 201 - len(entries)
