"""The forkserver in trouble: it is stopped, or temporary files are gone. Workers are replaced all the same."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mesh.faults.conftest import answered
from tests.mesh.faults.test_readiness import Own, own, worker_of
from tests.support.mesh import MESHES
from tests.support.watching import Gate, Process, Scrape, children, command_of, until
from unlatch import Client

GateMaker = Callable[[str], Gate]


def forkserver_of(mine: Own) -> int:
    (pid,) = (pid for pid in children(mine.dispatcher.pid) if "worker.forkserver" in command_of(pid))
    return pid


async def kill_worker(mine: Own, client: Client, gate: Gate) -> None:
    """Kill the only worker, and wait until another one serves."""
    metrics = mine.dispatcher.wait_for("serving")["metrics_listen"]
    before = Scrape(metrics).sum("unlatch_worker_restarts_total")
    os.kill(await worker_of(client, gate), signal.SIGKILL)
    await until(lambda: Scrape(metrics).sum("unlatch_worker_restarts_total") == before + 1, "the worker has ended")
    await until(lambda: Scrape(metrics).sum("unlatch_worker_up") == 1, "another worker is up", within=30.0)
    await answered(client)


@pytest.mark.parametrize("mesh", MESHES)
async def test_temporary_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: GateMaker, mesh: str
) -> None:
    """A replica has no file there. Without the directory killed workers are replaced, and so is a killed forkserver."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with own(tmp_path, 1, mesh=mesh) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            assert not [*temporary.iterdir()]
            temporary.rmdir()
            for time_of_day in ("evening", "night"):
                await kill_worker(mine, client, gate(time_of_day))
            os.kill(forkserver_of(mine), signal.SIGKILL)
            await kill_worker(mine, client, gate("morning"))
            assert await mine.is_serving()
            assert not temporary.exists()


@pytest.mark.parametrize("mesh", MESHES)
async def test_stopped_forkserver_is_replaced(tmp_path: Path, gate: GateMaker, mesh: str) -> None:
    """A stopped forkserver can neither fork nor end. It is noticed within stopped_worker_seconds, and started anew."""
    with own(tmp_path, 1, mesh=mesh) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            forkserver = Process.of(forkserver_of(mine))
            os.kill(forkserver.pid, signal.SIGSTOP)
            began = time.monotonic()
            await kill_worker(mine, client, gate("here"))
            # Two seconds until it is noticed, and the start of the next. Before, it took worker_start_seconds (60).
            assert time.monotonic() - began < 30.0
            assert not forkserver.alive
            assert forkserver_of(mine) != forkserver.pid
            (entry,) = (entry for entry in mine.dispatcher.entries if entry["event"] == "worker did not start")
            assert entry["message"] == "a worker did not start: the forkserver was stopped"
