"""A short soak: `make soak` for a few seconds."""

import subprocess
import sys

import pytest

from tests.support.mesh import ROOT


@pytest.mark.alone
@pytest.mark.timeout(150)
def test_every_call_ends_once_and_rightly_while_workers_are_killed() -> None:
    """Every reply is right by its content, every failure is one that the table predicts.

    None is lost or answered twice.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "bench.soak", "--seconds", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert "every call ended once" in ended.stdout
