"""`unlatch serve --reload`: edits are served, broken files leave the old kernels in place, and nothing hangs."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.support.mesh import Service
from tests.support.serve import START_SECONDS, free_address
from tests.support.watching import Process, children, until, wait_until
from unlatch import Client
from unlatch.common.errors import Aborted, NotFound, Unavailable

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(150)]

PORTS = ("", "metrics-", "health-")
ANY_PORTS = [part for port in PORTS for part in (f"--{port}listen", "127.0.0.1:0")]
X = np.arange(3.0)

HEAD = """\
import time

import numpy as np
from jaxtyping import Float64
from unlatch import kernel
"""
KERNEL = """

@kernel
def {name}(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    {text}
"""
TIMES_2 = HEAD + KERNEL.format(name="times", text="return x * 2")
TIMES_3 = HEAD + KERNEL.format(name="times", text="return x * 3")


@contextmanager
def reloading(kernels: Path | str, listen: str = "127.0.0.1:0", **environment: str) -> Iterator[Service]:
    """Run `unlatch serve --reload` until it watches. Stop it cleanly at the end."""
    command = ["serve", "--reload", "--workers", "2", "--kernels", str(kernels), *ANY_PORTS, "--listen", listen]
    with Service("unlatch", *command, environment=environment) as serve:
        serve.wait_for("replica is ready", within=START_SECONDS)
        serve.wait_for("watching kernels")
        yield serve
        serve.stop()
        wait_until(lambda: not who_serves(kernels), "no process of it is left")


def who_serves(kernels: Path | str) -> list[str]:
    """Return the processes that have these kernels in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and str(kernels).encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


def client_of(serve: Service) -> Client:
    return Client(serve.wait_for("serving", process="unit")["listen"], timeout=20.0)


async def heard(serve: Service, event: str, after: int) -> str:
    """Wait for a log line after this many others; return its message, if it has one."""
    entry = await asyncio.to_thread(serve.wait_for, event, after=after, within=START_SECONDS)
    return str(entry.get("message", ""))


async def gives(client: Client, kernel: str, factor: float) -> None:
    """Wait until a kernel gives this result: a replica that has just started is found within moments."""
    loop = asyncio.get_running_loop()
    end = loop.time() + START_SECONDS
    while True:
        try:
            np.testing.assert_array_equal(await client.call(kernel, X), X * factor)
        except (Unavailable, NotFound):
            assert loop.time() < end
            await asyncio.sleep(0.02)
        else:
            return


def unit_of(serve: Service) -> Process:
    (pid,) = children(serve.pid)
    unit = Process.of(pid)
    assert "-m unlatch.unit " in unit.command
    return unit


async def test_what_is_edited_is_served_and_what_is_broken_is_not(tmp_path: Path) -> None:
    """A connected client sees an edit, does not see a mistake, and then sees the mended file with a new kernel."""
    path = tmp_path / "mine.py"
    path.write_text(TIMES_2)
    with reloading(path) as serve:
        unit = unit_of(serve)
        async with client_of(serve) as client:
            await gives(client, "times", 2)
            seen = len(serve.lines)
            path.write_text(TIMES_3)
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 3)

            seen = len(serve.lines)
            path.write_text(TIMES_2 + "\nimport no_such_module\n")
            message = await heard(serve, "kernels do not load, replica stays", seen)
            assert f"{path}:12: ModuleNotFoundError" in message
            np.testing.assert_array_equal(await client.times(X), X * 3)

            seen = len(serve.lines)
            path.write_text(HEAD)
            message = await heard(serve, "kernels do not load, replica stays", seen)
            assert message == f"{path}: declares no kernel"
            np.testing.assert_array_equal(await client.times(X), X * 3)

            seen = len(serve.lines)
            path.write_text(TIMES_2 + KERNEL.format(name="added", text="return x + x"))
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "added", 2)
            await gives(client, "times", 2)
            assert {"added", "times"} <= {spec.name for spec in await client.kernels()}
        assert unit.alive
        # A replica that is replaced is away as announced: only the mistakes in the file are faults.
        faults = {entry["event"] for entry in serve.entries if entry["level"] in {"warning", "error"}}
        assert faults - {"call"} == {"kernels do not load, replica stays"}


async def test_an_edit_during_the_start_is_served(tmp_path: Path) -> None:
    """A file that changes after the replica has read it, and before it is watched, is served too."""
    path = tmp_path / "mine.py"
    path.write_text(TIMES_2)
    command = ["serve", "--reload", "--workers", "1", "--kernels", str(path), *ANY_PORTS]
    with Service("unlatch", *command) as serve:
        serve.wait_for("serving", process="unit", within=START_SECONDS)
        path.write_text(TIMES_3)
        await heard(serve, "kernels reloaded", 0)
        async with client_of(serve) as client:
            await gives(client, "times", 3)
        serve.stop()


async def test_a_directory_that_is_made_anew_is_watched(tmp_path: Path) -> None:
    """Switching a branch removes directories and makes them again: the files there are served and watched."""
    directory = tmp_path / "kernels"
    directory.mkdir()
    path = directory / "mine.py"
    path.write_text(TIMES_2)
    with reloading(path) as serve:
        async with client_of(serve) as client:
            await gives(client, "times", 2)
            seen = len(serve.lines)
            path.unlink()
            directory.rename(tmp_path / "gone")
            directory.mkdir()
            path.write_text(TIMES_3)
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 3)
            seen = len(serve.lines)
            path.write_text(TIMES_2)
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 2)


async def test_what_a_file_imports_is_watched_too(tmp_path: Path) -> None:
    """A module beside the file is watched, and so is one that is imported later."""
    path, beside, later = tmp_path / "mine.py", tmp_path / "beside.py", tmp_path / "deep" / "later.py"
    later.parent.mkdir()
    text = HEAD + "from beside import FACTOR\n" + KERNEL.format(name="times", text="return x * FACTOR")
    path.write_text(text)
    beside.write_text("FACTOR = 2\n")
    with reloading(path) as serve:
        async with client_of(serve) as client:
            seen = len(serve.lines)
            beside.write_text("FACTOR = 5\n")
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 5)

            seen = len(serve.lines)
            beside.write_text("from deep.later import FACTOR\n")
            assert f"{beside}:1: " in await heard(serve, "kernels do not load, replica stays", seen)
            later.write_text("FACTOR = 6\n")
            seen = len(serve.lines)
            beside.write_text("from deep.later import FACTOR  # which is there now\n")
            await heard(serve, "watching kernels", seen)
            await gives(client, "times", 6)

            seen = len(serve.lines)
            later.write_text("FACTOR = 7\n")
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 7)


async def test_a_package_is_watched(tmp_path: Path) -> None:
    """A package is given by its dotted name. Its files that the named module imports are watched."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "factor.py").write_text("FACTOR = 2\n")
    text = HEAD + "from my_package.factor import FACTOR\n" + KERNEL.format(name="times", text="return x * FACTOR")
    (package / "kernels.py").write_text(text)
    with reloading("my_package.kernels", PYTHONPATH=str(tmp_path)) as serve:
        async with client_of(serve) as client:
            await gives(client, "times", 2)
            seen = len(serve.lines)
            (package / "factor.py").write_text("FACTOR = 4\n")
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 4)


async def test_calls_in_flight_end(tmp_path: Path) -> None:
    """A call that would run for longer than the drain ends ABORTED. The next one is served by the new file."""
    path, begun = tmp_path / "mine.py", tmp_path / "begun"
    slow = f"open({str(begun)!r}, 'w').close(); time.sleep(60); return x"
    path.write_text(TIMES_2 + KERNEL.format(name="slow", text=slow))
    with reloading(path) as serve:
        async with client_of(serve) as client:
            await gives(client, "times", 2)
            in_flight = asyncio.ensure_future(client.slow(X))
            await until(begun.exists, "the call runs")
            path.write_text(TIMES_3)
            with pytest.raises(Aborted):
                await in_flight
            await gives(client, "times", 3)
            with pytest.raises(NotFound):
                await client.slow(X)


async def test_a_stop_in_the_middle_of_a_reload_leaves_nothing(tmp_path: Path) -> None:
    """A stop while the replica is being replaced ends with code 0."""
    path = tmp_path / "mine.py"
    path.write_text(TIMES_2)
    with reloading(path) as serve:
        path.write_text(TIMES_3)
        await heard(serve, "kernels changed", 0)


async def test_a_unit_that_is_killed_is_started_again_beside_reloads(tmp_path: Path) -> None:
    """A killed unit comes back with what is in the file, without a reload. A later edit is served."""
    path = tmp_path / "mine.py"
    path.write_text(TIMES_2)
    with free_address() as address, reloading(path, address) as serve:
        async with client_of(serve) as client:
            await gives(client, "times", 2)
            seen = len(serve.lines)
            os.kill(unit_of(serve).pid, signal.SIGKILL)
            await heard(serve, "restarting service", seen)
            # The client may not have noticed before its next call that its lane has broken.
            with suppress(Aborted, Unavailable):
                await client.call("times", X)
            await gives(client, "times", 2)
            seen = len(serve.lines)
            path.write_text(TIMES_3)
            await heard(serve, "kernels reloaded", seen)
            await gives(client, "times", 3)
