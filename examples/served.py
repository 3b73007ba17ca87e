"""Code that the examples share: their arguments, and a mesh to call."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from unlatch import BlockingClient

_ANY_PORTS = [f"--{door}listen=127.0.0.1:0" for door in ("", "metrics-", "health-")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A client of a mesh, and the address of its /metrics if that is known."""

    mesh: BlockingClient
    metrics: str


def arguments(about: str | None, output: str) -> Namespace:
    """Parse an example's command line: `output`, a path, and `server`, an address or nothing."""
    parser = ArgumentParser(description=about)
    parser.add_argument("output", nargs="?", type=Path, default=Path(output), help=f"file to save; {output} by default")
    parser.add_argument("--server", default="", help="address of a gateway; without it a mesh is started")
    return parser.parse_args()


@contextmanager
def served(server: str, *flags: str) -> Iterator[Served]:
    """Connect to the mesh at an address; without one, run `unlatch serve` with these flags on free ports."""
    if server:
        with BlockingClient(server) as mesh:
            yield Served(mesh=mesh, metrics="")
        return
    command = [str(Path(sys.executable).with_name("unlatch")), "serve", *_ANY_PORTS, *flags]
    with Popen(command, stderr=PIPE, text=True) as process:
        try:
            log = _log_until_ready(process)
            with BlockingClient(log["serving"]["listen"]) as mesh:
                yield Served(mesh=mesh, metrics=log["serving"]["metrics_listen"])
        finally:
            process.terminate()
            process.communicate()


def _log_until_ready(process: "Popen[str]") -> dict[str, dict[str, Any]]:
    """Read log entries by event. Raises SystemExit, with the last line, if the process ends."""
    log: dict[str, dict[str, Any]] = {}
    line = ""
    while "serving" not in log or "replica is ready" not in log:
        said, line = line, process.stderr.readline() if process.stderr else ""
        if not line:
            raise SystemExit(f"unlatch serve ended: {said}")
        entry = json.loads(line) if line.startswith("{") else {}
        log[entry.get("event", "")] = entry
    return log
