"""The command line as users see it: its exit code, its stdout, its stderr."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.mesh import ROOT, Mesh
from unlatch.cli import run

COMMAND = [sys.executable, "-m", "unlatch"]
OF_A_GATEWAY = ("call", "map", "kernels")


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The only line on stdout, parsed."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> dict[str, str]:
        """The error that --json printed on stderr, parsed."""
        (line,) = self.err.splitlines()
        error: dict[str, str] = json.loads(line)["error"]
        return error


Unlatch = Callable[..., Ran]


@pytest.fixture
def unlatch(mesh: Mesh, capsys: pytest.CaptureFixture[str]) -> Unlatch:
    """Run a command in this process, against the shared mesh."""

    def ran(command: str, *arguments: str) -> Ran:
        server = ["--server", mesh.gateway] if command in OF_A_GATEWAY else []
        capsys.readouterr()
        try:
            code = run([command, *arguments, *server])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return ran


def process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Run a command as a process of its own, from any directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*COMMAND, *arguments], env=environment, start_new_session=True, **options)
