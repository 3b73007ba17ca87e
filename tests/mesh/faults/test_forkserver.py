"""The forkserver in trouble: its socket has lost its name, or it is stopped. Workers are replaced all the same."""

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mesh.faults.conftest import answered
from tests.mesh.faults.test_readiness import Own, own, worker_of
from tests.support.mesh import MESHES
from tests.support.watching import Gate, Process, Scrape, children, command_of, until
from unlatch import Client

GateMaker = Callable[[str], Gate]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files of the services that the test starts: its path is short enough for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="test-"))
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def empty(directory: Path) -> None:
    """Remove all that is in a directory, as a cleaner of temporary files does."""
    assert [*directory.iterdir()]
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def forkserver_of(mine: Own) -> int:
    (pid,) = (pid for pid in children(mine.dispatcher.pid) if "multiprocessing.forkserver" in command_of(pid))
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
async def test_temporary_directory_is_emptied(tmp_path: Path, temporary: Path, gate: GateMaker, mesh: str) -> None:
    """Each worker that is killed afterwards is replaced, however often the directory is emptied."""
    with own(tmp_path, 1, mesh=mesh) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            for time_of_day in ("evening", "night", "morning"):
                empty(temporary)
                await kill_worker(mine, client, gate(time_of_day))
            await kill_worker(mine, client, gate("noon"))
            assert await mine.is_serving()


@pytest.mark.parametrize("mesh", MESHES)
async def test_temporary_directory_is_gone(tmp_path: Path, temporary: Path, gate: GateMaker, mesh: str) -> None:
    """Without the directory no worker can be started: readiness names the path. Once it is back, workers start."""
    with own(tmp_path, 1, mesh=mesh) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            pid = await worker_of(client, gate("here"))
            shutil.rmtree(temporary)
            os.kill(pid, signal.SIGKILL)
            entry = await asyncio.to_thread(mine.dispatcher.wait_for, "replica takes no calls", within=30.0)
            assert str(temporary) in entry["message"]
            assert not await mine.is_serving()
            await asyncio.to_thread(temporary.mkdir)
            await asyncio.to_thread(mine.dispatcher.wait_for, "replica takes calls again", within=60.0)
            await answered(client)


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
