"""A service's process as its supervisor has it: real processes, which tell that they are ready and drain at SIGTERM."""

import asyncio
import signal
from pathlib import Path
from shutil import rmtree

from tests.support.watching import until
from unlatch.supervisor.child import Child

# Drains until a file is there. A second SIGTERM ends it at once, as it does a service.
_DRAINS = """
import os, signal, socket, sys, time
from pathlib import Path
reached, opened = Path(sys.argv[1]), Path(sys.argv[2])

def drain(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reached.touch()
    while not opened.exists():
        time.sleep(0.01)
    opened.unlink()
    os._exit(0)

signal.signal(signal.SIGTERM, drain)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
time.sleep(600)
"""


async def test_stop_during_a_restart_lets_the_process_drain(tmp_path: Path) -> None:
    """A process that drains for a restart is not told to end a second time when its supervisor stops."""
    reached, opened = tmp_path / "reached", tmp_path / "opened"
    child = Child(
        "drains", ("-c", _DRAINS, str(reached), str(opened)), tmp_path, start_seconds=60.0, drain_seconds=60.0
    )
    assert await child.start() is None
    restarting = asyncio.create_task(child.restart())
    await until(reached.exists, "it drains for the restart", 60.0)
    restarting.cancel()
    await asyncio.wait((restarting,))
    stopping = asyncio.create_task(child.stop())
    # Give it the time to be told again.
    done, _ = await asyncio.wait((stopping,), timeout=0.2)
    assert not done
    opened.touch()
    assert await stopping


async def test_restarted_process_is_told_to_end(tmp_path: Path) -> None:
    """Each process is told once: the one that a restart has ended, and the next one."""
    reached, opened = tmp_path / "reached", tmp_path / "opened"
    child = Child(
        "drains", ("-c", _DRAINS, str(reached), str(opened)), tmp_path, start_seconds=60.0, drain_seconds=60.0
    )
    assert await child.start() is None
    opened.touch()
    assert await child.restart()
    assert not opened.exists()
    opened.touch()
    assert await child.stop()
    assert not opened.exists()


async def test_process_is_not_ended_if_no_other_could_be_started(tmp_path: Path) -> None:
    """The directory of temporary files is gone, so the next process could not tell that it serves."""
    reached, opened = tmp_path / "reached", tmp_path / "opened"
    temporary = tmp_path / "temporary"
    directory = temporary / "unlatch"
    directory.mkdir(parents=True)
    child = Child(
        "drains", ("-c", _DRAINS, str(reached), str(opened)), directory, start_seconds=60.0, drain_seconds=60.0
    )
    assert await child.start() is None
    rmtree(temporary)
    assert not await child.restart()
    assert not reached.exists()
    temporary.mkdir()
    opened.touch()
    assert await child.restart()
    opened.touch()
    assert await child.stop()


async def test_process_that_stands_still_as_it_starts_is_killed(tmp_path: Path) -> None:
    """Its start ends with its exit code, so a restart goes on to say that it does not serve."""
    stopped = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    child = Child("stopped", ("-c", stopped), tmp_path, start_seconds=0.5, drain_seconds=60.0)
    assert await child.start() == -signal.SIGKILL
    assert not await child.restart()
    assert await child.stop()
