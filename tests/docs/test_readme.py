"""The code blocks of the README and of the guide to kernels run as they are written, in order.

    ```bash        run by bash. One that serves (`make run`, `unlatch serve`) is left running until the next one serves.
    ```python      run by Python; one whose first line is `# a_name.py` is saved under that name instead
    ```javascript  saved, by the same rule

The README's directory is like a fresh checkout's, the guide's is empty. They use the default ports. To keep them apart
from other programs on the machine, all blocks run in a network namespace of their own where the system grants one.
Where it does not, and the ports are taken, the test is skipped. Only `npm install` runs before, outside the namespace.
Where it fails, the blocks that need it are left out, and the test is skipped at its end to say so.
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

from tests.support.mesh import ROOT

README, GUIDE = ROOT / "README.md", ROOT / "docs" / "kernels.md"
BLOCK = re.compile(r"^```(bash|python|javascript)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?:#|//) (\w+\.\w+)\n")
SERVES = re.compile(r"^(make run|\S*unlatch serve)\b", re.MULTILINE)
INSTALLS = re.compile(r"^npm install\b")
NODE = re.compile(r"^node\b")
PORTS = (8001, 8002, 8003)
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


@pytest.mark.timeout(120)
def test_readme_runs_as_written(tmp_path: Path) -> None:
    """Every block ends with 0, and so does each server when it is stopped."""
    for entry in ROOT.iterdir():
        if entry.name not in {".git", "demo", "build", "dist"} and not entry.name.endswith("_cache"):
            (tmp_path / entry.name).symlink_to(entry)
    run_document(README, tmp_path)


@pytest.mark.timeout(180)
def test_guide_runs_as_written(tmp_path: Path) -> None:
    """The guide leads from an empty directory to an own kernel, called from the shell, from Python and from Node."""
    lacking = npm_installs(GUIDE, tmp_path)
    run_document(GUIDE, tmp_path, *(["--without-node"] if lacking else []))
    if lacking:
        pytest.skip(f"all but Node ran: {lacking}")


def npm_installs(document: Path, directory: Path) -> str:
    """Run the document's `npm install`. Return the reason if it cannot run."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            return f"{tool} is missing"
    for _, code in BLOCK.findall(document.read_text()):
        if INSTALLS.match(code):
            ran = subprocess.run(
                code, shell=True, cwd=directory, capture_output=True, text=True, timeout=60, check=False
            )
            if ran.returncode:
                return f"npm cannot install: {ran.stderr.strip().splitlines()[:1]}"
    return ""


def run_document(document: Path, directory: Path, *options: str) -> None:
    """Run a document's blocks in a directory, in a network namespace if there can be one."""
    isolated = ["unshare", "--map-root-user", "--net", "--pid", "--mount-proc", "--fork", "--kill-child", "--"]
    if not _works(isolated):
        isolated = []
        if taken := [port for port in PORTS if _is_taken(port)]:
            pytest.skip(f"no network namespace is granted here, and ports {taken} are taken")
    options = (*options, *(["--loopback-up"] if isolated else []))
    ran = subprocess.run(
        [*isolated, sys.executable, "-m", "tests.docs.test_readme", str(document), str(directory), *options],
        cwd=ROOT,
        # Leave out the settings of the user who runs the tests, and the ARGS that `make test` hands to every make below
        # it.
        env={name: value for name, value in os.environ.items() if not name.startswith(("UNLATCH_", "MAKE", "MFLAGS"))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:]


def run_blocks(document: Path, directory: Path, *, node: bool) -> None:
    """Run every block. Raises CalledProcessError or AssertionError after printing what was run."""
    server: Server | None = None
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for language, code in BLOCK.findall(document.read_text()):
        print(f"---\n{code}", flush=True)
        if INSTALLS.match(code) or (NODE.match(code) and not node):
            continue
        if language == "bash" and SERVES.search(code):
            if server is not None:
                server.stop()
            server = Server(code, directory)
        elif language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=directory, check=True, timeout=60)
        elif named := NAMED.match(code):
            (directory / named[1]).write_text(code)
            if server is not None and named[1] in server.code and "--reload" in server.code:
                server.wait_for("kernels reloaded")
        else:
            subprocess.run([sys.executable, "-c", code], cwd=directory, check=True, timeout=60)
    if server is not None:
        server.stop()


class Server:
    """A server that a block has started."""

    def __init__(self, code: str, directory: Path) -> None:
        self.code = code
        self._log = directory / "server.log"
        self._seen = 0
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", code], cwd=directory, stderr=log, text=True, start_new_session=True
            )
        self.wait_for("serving", *(["watching kernels"] if "--reload" in code else []))

    def wait_for(self, *events: str) -> None:
        """Wait until the server has logged these, and that a replica is ready, since the last wait."""
        deadline = time.monotonic() + 30.0
        while True:
            lines = self._log.read_text().split("\n")[:-1]
            entries = [json.loads(line) for line in lines[self._seen :] if line.startswith("{")]
            if {*events, "replica is ready"} <= {
                entry["event"] for entry in entries if entry["process"] != "dispatcher"
            }:
                self._seen = len(lines)
                return
            assert self._process.poll() is None, f"the server ended: {self._log.read_text()}"
            assert time.monotonic() < deadline, f"no {events}: {self._log.read_text()}"
            signal.sigtimedwait((), 0.05)

    def stop(self) -> None:
        """Send Ctrl-C, as a reader would."""
        os.killpg(self._process.pid, signal.SIGINT)
        self._process.wait(10)


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
    _document, _directory, *_options = sys.argv[1:]
    if "--loopback-up" in _options:
        _loopback_up()
    try:
        run_blocks(Path(_document), Path(_directory), node="--without-node" not in _options)
    finally:
        print("--- the last server's log\n" + (Path(_directory) / "server.log").read_text())
