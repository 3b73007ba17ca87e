"""How services end, and what is left: the table of exit codes in docs/operations/settings.md, row by row."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.mesh.faults.conftest import ANY_PORTS, FAULT_KERNELS
from tests.mesh.faults.test_supervisor import gone
from tests.support.mesh import Service
from tests.support.serve import START_SECONDS, serving, starting, units
from tests.support.watching import Gate, tree, until, wait_until
from unlatch import Client
from unlatch.common.errors import Aborted, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="session")

SERVICES = ("serve", "gateway", "compute")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The import of this module waits until the test opens the gate.
WAITING_KERNELS = "open({gate!r}).read()"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The services' directory of temporary files."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    assert not list(directory.iterdir())


def flags(name: str, directory: Path) -> tuple[str, ...]:
    """Flags with which a service can serve, on ports of its own."""
    ports = ("--listen", f"unix:{directory}/{name}.sock", *ANY_PORTS)
    return (*ports, "--replicas", f"unix:{directory}/nothing.sock") if name == "gateway" else ports


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", SERVICES)
async def test_stop_while_modules_load(temporary: Path, tmp_path: Path, name: str, number: signal.Signals) -> None:
    """A service that is told to stop before it has done anything ends with code 0, and leaves nothing."""
    with Service("unlatch", name, *flags(name, tmp_path)) as service:
        maps = Path(f"/proc/{service.pid}/maps")
        # Pydantic is loaded after the first lines of our own code, and long before the end of the start.
        wait_until(lambda: "pydantic_core" in maps.read_text(), "modules are being loaded", START_SECONDS)
        processes = tree(service.pid)
        service.signal(number)
        assert service.wait() == 0, service
        await gone(processes, set(), f"{number.name} of {name} while modules load")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
async def test_restart_is_asked_for_while_modules_load(temporary: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGUSR2 ends nothing that has no units yet to restart, and SIGUSR1 nothing that cannot reload kernels."""
    with Service("unlatch", "serve", *flags("serve", tmp_path)) as service:
        maps = Path(f"/proc/{service.pid}/maps")
        wait_until(lambda: "pydantic_core" in maps.read_text(), "modules are being loaded", START_SECONDS)
        service.signal(number)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0, service


async def test_signal_without_a_meaning_ends_nothing() -> None:
    """SIGUSR1 to a supervisor and to its unit, which serve without `--reload`."""
    with serving() as serve:
        os.kill(serve.unit, signal.SIGUSR1)
        serve.service.signal(signal.SIGUSR1)
        async with Client(serve.address, timeout=30.0) as client:
            await client.identity(np.arange(3.0))
        serve.service.stop()
    assert not any("restarting service" in line for line in serve.service.lines)


async def test_units_cannot_be_started(temporary: Path) -> None:
    """The error names what the system refuses, and the code is 1: the next start may succeed."""
    runner = ("prlimit", "--nofile=20:20", sys.executable, "-m")
    with Service(
        "unlatch", "serve", "--units", "2", "--workers", "2", "--listen", "127.0.0.1:0", *ANY_PORTS, runner=runner
    ) as service:
        assert service.wait(START_SECONDS) == 1, service
        assert service.lines[-1] == "unlatch serve: units cannot be started: Too many open files", service


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["serve", "compute"])
async def test_stop_while_kernels_load(temporary: Path, tmp_path: Path, name: str, number: signal.Signals) -> None:
    """A service whose kernels are still being imported ends in the same way."""
    gate = Gate(tmp_path / "gate")
    module = tmp_path / "waits.py"
    module.write_text(WAITING_KERNELS.format(gate=str(gate)))
    with Service("unlatch", name, *flags(name, tmp_path), "--kernels", str(module)) as service:
        await until(lambda: gate.reached, "the module is being imported", START_SECONDS)
        processes = tree(service.pid)
        service.signal(number)
        assert service.wait() == 0, service
        await gone(processes, set(), f"{number.name} of {name} while kernels load")


@pytest.mark.parametrize("name", ["gateway", "compute"])
async def test_closed_terminal_drains_a_service(temporary: Path, tmp_path: Path, name: str) -> None:
    """SIGHUP begins a drain, as SIGTERM does."""
    with Service("unlatch", name, *flags(name, tmp_path)) as service:
        service.wait_for("serving", within=START_SECONDS)
        service.signal(signal.SIGHUP)
        service.wait_for("draining", signal="SIGHUP")
        assert service.wait() == 0, service


async def test_closed_terminal_does_not_stop_a_service_under_nohup(temporary: Path, tmp_path: Path) -> None:
    """A service that was started with SIGHUP ignored goes on ignoring it."""
    with Service("unlatch.gateway", *flags("gateway", tmp_path), runner=("nohup", sys.executable, "-m")) as service:
        service.wait_for("serving", within=START_SECONDS)
        service.signal(signal.SIGHUP)
        service.signal(signal.SIGTERM)
        service.wait_for("draining", signal="SIGTERM")
        assert service.wait() == 0, service


@pytest.mark.timeout(150)
async def test_child_killed_while_it_starts(tmp_path: Path) -> None:
    """`serve` ends with code 1 and names the service and its end, and no process is left."""
    gate = Gate(tmp_path / "gate")
    module = tmp_path / "waits.py"
    module.write_text(WAITING_KERNELS.format(gate=str(gate)))
    with starting(kernels=str(module)) as serve:
        await until(lambda: gate.reached, "the module is being imported", START_SECONDS)
        processes = tree(serve.service.pid)
        os.kill(serve.unit, signal.SIGKILL)
        serve.service.wait_for("service ended while it started", service="unit", ended_with=-signal.SIGKILL)
        assert serve.service.wait() == 1, serve.service
        # The import still waits at the gate: the forkserver does not have to notice anything.
        await gone(processes, set(), "SIGKILL of a child at start")


@pytest.mark.timeout(150)
async def test_child_killed_as_it_begins_to_start(tmp_path: Path) -> None:
    """The same before the child has loaded anything."""
    # However late this test sees the child, its start has not ended: a child that serves would be started again.
    module = tmp_path / "waits.py"
    module.write_text(WAITING_KERNELS.format(gate=str(Gate(tmp_path / "gate"))))
    with starting(kernels=str(module)) as serve:
        await until(lambda: units(serve.service), "the unit is starting", START_SECONDS)
        os.kill(serve.unit, signal.SIGKILL)
        assert serve.service.wait() == 1, serve.service


async def test_worker_killed_while_it_starts(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is 1, since the next start may succeed: systemd tries it again, unlike after a 2."""
    # A directory of this test alone: workers of other tests must not wait at this gate.
    monkeypatch.setenv("FAULTS_DIRECTORY", str(tmp_path))
    (tmp_path / "waits.start").touch()
    gate = Gate(tmp_path / "gate")
    with Service(
        "unlatch", "compute", *flags("compute", tmp_path), "--kernels", str(FAULT_KERNELS), "--workers", "1"
    ) as service:
        await until(lambda: gate.reached, "a worker starts", START_SECONDS)
        processes = tree(service.pid)
        os.kill(gate.pid, signal.SIGKILL)
        assert service.wait() == 1, service
        assert "a worker ended before it was ready: the worker was killed by SIGKILL" in str(service)
        await gone(processes, set(), "SIGKILL of a worker at start")


async def test_unit_killed_while_it_drains(tmp_path: Path) -> None:
    """`serve` ends with code 1, since calls were lost, and its log names the end of the unit."""
    gate = Gate(tmp_path / "gate")
    with serving(kernels=str(FAULT_KERNELS), drain_seconds="60") as serve:
        async with Client(serve.address, timeout=30.0) as client:
            call = asyncio.ensure_future(client.waits(np.ones(3), gate=str(gate)))
            await until(lambda: gate.reached, "a call runs")
            processes, unit = tree(serve.service.pid), serve.unit
            serve.service.signal(signal.SIGTERM)
            await asyncio.to_thread(serve.service.wait_for, "draining", process="unit")
            os.kill(unit, signal.SIGKILL)
            await asyncio.to_thread(
                serve.service.wait_for, "service ended while it drained", ended_with=-signal.SIGKILL
            )
            assert serve.service.wait() == 1, serve.service
            await gone(processes, set(), "SIGKILL of a unit that drains")
            with pytest.raises(Aborted):
                await call


@pytest.mark.timeout(150)
async def test_next_start_removes_what_a_killed_supervisor_left(tmp_path: Path) -> None:
    """A killed `serve` leaves its directories; the next removes them, and touches no other's."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    kept = [temporary / "unlatch-mine", temporary / "other"]
    for directory in kept:
        directory.mkdir()
    with serving(temporary) as killed, serving(temporary) as other:
        running = set(temporary.iterdir())
        processes = tree(killed.service.pid)
        killed.service.signal(signal.SIGKILL)
        await gone(processes, set(), "SIGKILL of a supervisor")
        assert set(temporary.iterdir()) == running
        with serving(temporary) as third:
            await answers(other.address)
            await answers(third.address)
            third.service.stop()
        other.service.stop()
    assert set(temporary.iterdir()) == set(kept)


@pytest.mark.parametrize("name", ["serve", "compute"])
async def test_no_directory_for_sockets_prevents_the_start(tmp_path: Path, name: str) -> None:
    """Without a writable directory of temporary files `serve` ends with code 2, and names the setting that helps.

    `compute` needs no such directory, and serves.
    """
    runner = ("unshare", "--mount", "--map-root-user", "sh", "-c", READ_ONLY, sys.executable, "-m")
    # Not a socket in a hidden directory: this would be refused first.
    listen = ("--listen", "127.0.0.1:0")
    with Service("unlatch", name, *flags(name, tmp_path), *listen, runner=runner, directory=Path("/proc")) as service:
        if name == "compute":
            service.wait_for("serving")
            service.stop()
            return
        assert service.wait() == 2, service
        told = [line for line in service.lines if line.startswith("unlatch serve: ")]
        assert len(told) == 1, service
        assert "set TMPDIR" in told[0]
        assert not any("Traceback" in line for line in service.lines), service


# Every directory that Python tries is read-only: a file system of its own hides what is in them.
READ_ONLY = """\
for place in /tmp /var/tmp /usr/tmp; do mount -t tmpfs -o ro none $place; done
exec "$0" "$@"
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("length", [84, 200])
async def test_long_path_of_temporary_files(tmp_path: Path, length: int) -> None:
    """A directory whose path is too long for sockets is not used for them; the services start."""
    directory = tmp_path / ("d" * length)
    directory.mkdir()
    with serving(directory) as serve:
        await answers(serve.address)
        processes = tree(serve.service.pid)
        serve.service.stop()
        await gone(processes, set(), f"SIGTERM with a path of {length} bytes")
    assert not list(directory.iterdir())


@pytest.mark.timeout(150)
async def test_service_without_standard_descriptors(temporary: Path, tmp_path: Path) -> None:
    """If descriptors 0 to 2 are closed at the start, /dev/null takes their place, and no socket does."""
    runner = ("sh", "-c", 'exec "$0" "$@" 0<&- 1>&- 2>&-', sys.executable, "-m")
    with Service("unlatch", *("serve", *flags("serve", tmp_path)), runner=runner) as service:
        await answers(f"unix:{tmp_path}/serve.sock")
        for process in tree(service.pid):
            for fd in range(3):
                assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == "/dev/null", process
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.timeout(150)
async def test_service_without_home_and_shared_memory(temporary: Path, tmp_path: Path) -> None:
    """A service needs neither HOME nor /dev/shm."""
    runner = ("unshare", "--mount", "--map-root-user", "sh", "-c", HIDDEN, sys.executable, "-m")
    with Service("unlatch", *("serve", *flags("serve", tmp_path)), runner=runner) as service:
        await answers(f"unix:{tmp_path}/serve.sock")
        service.stop()


HIDDEN = 'unset HOME; mount -t tmpfs -o ro,mode=0 none /dev/shm; exec "$0" "$@"'


async def answers(address: str) -> None:
    """Wait until a service that starts answers a call."""
    end = time.monotonic() + START_SECONDS
    async with Client(address, timeout=10.0) as client:
        while True:
            try:
                np.testing.assert_array_equal(await client.identity(np.ones(3)), np.ones(3))
            except Unavailable:
                assert time.monotonic() < end, f"no call is answered within {START_SECONDS} s"
                await asyncio.sleep(0.1)
            else:
                return
