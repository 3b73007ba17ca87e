"""The README's code blocks run as they are written, in order, from a directory like a fresh checkout's.

    ```bash      run by bash. One that serves (`make run`, `unlatch serve`) is left running until the next one serves.
    ```python    run by Python; one whose first line is `# a_name.py` is saved under that name instead

They use the default ports. So that nothing else on the machine is in the way, or is disturbed, all of it happens in a
network namespace of its own where the system grants one. Where it does not, and the ports are taken, it is skipped.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mesh import ROOT

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVES = re.compile(r"^(make run|\S*unlatch serve)\b", re.MULTILINE)
PORTS = (8001, 8002, 8003, 8012, 8013)
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


@pytest.mark.timeout(120)
def test_readme_runs_as_written(tmp_path: Path) -> None:
    """Every block ends with 0, and each server too when it is told to stop."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", "demo", "build", "dist"} and not entry.name.endswith("_cache"):
            (tmp_path / entry.name).symlink_to(entry)
    isolated = ["unshare", "--map-root-user", "--net", "--pid", "--mount-proc", "--fork", "--kill-child", "--"]
    if not _works(isolated):
        isolated = []
        if taken := [port for port in PORTS if _is_taken(port)]:
            pytest.skip(f"no network namespace is granted here, and ports {taken} are taken")
    ran = subprocess.run(
        [*isolated, sys.executable, "-m", "tests.test_readme", str(tmp_path), *(["up"] if isolated else [])],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("UNLATCH_")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]


def run_blocks(directory: Path) -> None:
    """Run every block. Raises CalledProcessError or AssertionError, with what was run just printed."""
    server: subprocess.Popen[str] | None = None
    os.environ["PATH"] = f"{directory / '.venv/bin'}:{os.environ['PATH']}"
    for language, code in BLOCK.findall((directory / "README.md").read_text()):
        print(f"---\n{code}", flush=True)
        name = re.match(r"# (\w+\.py)\n", code)
        if language == "python" and name:
            (directory / name[1]).write_text(code)
        elif language == "python":
            subprocess.run([".venv/bin/python", "-c", code], cwd=directory, check=True, timeout=60)
        elif SERVES.search(code):
            _stop(server)
            server = _serve(code, directory)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=directory, check=True, timeout=60)
    _stop(server)


def _serve(code: str, directory: Path) -> subprocess.Popen[str]:
    path = directory / "server.log"
    with path.open("w") as log:
        server = subprocess.Popen(["bash", "-c", code], cwd=directory, stderr=log, text=True, start_new_session=True)
    deadline = time.monotonic() + 30.0
    while True:
        entries = [json.loads(line) for line in path.read_text().split("\n")[:-1] if line.startswith("{")]
        if {"serving", "replica is ready"} <= {entry["event"] for entry in entries if entry["process"] == "gateway"}:
            return server
        assert server.poll() is None, f"the server ended: {path.read_text()}"
        assert time.monotonic() < deadline, f"the server is not ready: {path.read_text()}"
        signal.sigtimedwait((), 0.05)


def _stop(server: subprocess.Popen[str] | None) -> None:
    if server is not None:
        os.killpg(server.pid, signal.SIGINT)  # Ctrl-C, as whoever reads the README would
        server.wait(10)


def _works(isolated: list[str]) -> bool:
    if shutil.which(isolated[0]) is None:
        return False
    return subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode == 0


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


if __name__ == "__main__":
    if "up" in sys.argv:
        _loopback_up()
    try:
        run_blocks(Path(sys.argv[1]))
    finally:
        print("--- the last server's log\n" + (Path(sys.argv[1]) / "server.log").read_text())
