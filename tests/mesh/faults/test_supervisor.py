"""`unlatch serve`: killed services are started again, failed starts end it, and no process outlives it."""

import asyncio
import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.mesh.faults.conftest import ANY_PORTS, FAULT_KERNELS, answered, dispatcher_at, gateway_to
from tests.support.mesh import Service
from tests.support.watching import (
    Gate,
    Process,
    alive,
    all_memory_files,
    children,
    memory_files,
    tree,
    until,
    wait_until,
)
from unlatch import Client
from unlatch.common.errors import Unavailable, UnlatchError

pytestmark = pytest.mark.asyncio(loop_scope="session")

X = np.arange(3.0)
GONE_WITHIN_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Serve:
    """An `unlatch serve` of this test alone, which may leave files in `directory`."""

    service: Service
    address: str
    directory: Path

    @property
    def gateway(self) -> int:
        return self._child("gateway")

    @property
    def dispatcher(self) -> int:
        return self._child("compute")

    def _child(self, module: str) -> int:
        for pid in children(self.service.pid):
            if f"-m unlatch.{module} " in Process.of(pid).command:
                return pid
        raise AssertionError(f"no {module}; {self.service}")


@contextmanager
def starting(**listen: str) -> Iterator[Serve]:
    """Start `unlatch serve`, on free ports unless told otherwise."""
    names = ("listen", "metrics_listen", "health_listen", "compute_metrics_listen", "compute_health_listen")
    with ExitStack() as reserved:
        # A directory apart from the test's: a socket's path has 107 characters at most, and the test's may take 80.
        scratch = Path(reserved.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
        addresses = {name: listen.pop(name, "") or reserved.enter_context(free_address()) for name in names}
        flags = {"workers": "2", "kernels": str(FAULT_KERNELS), **listen, **addresses}
        arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
        with Service("unlatch", "serve", *arguments, environment={"TMPDIR": str(scratch)}) as service:
            yield Serve(service=service, address=addresses["listen"], directory=scratch)
    wait_until(lambda: not who_mentions(scratch), "nothing mentions its directory")


@contextmanager
def serving(**flags: str) -> Iterator[Serve]:
    """Start it and wait until it serves."""
    with starting(**flags) as serve:
        serve.service.wait_for("serving", process="gateway")
        serve.service.wait_for("replica is ready", process="gateway")
        yield serve


@contextmanager
def free_address() -> Iterator[str]:
    """Reserve an address, which the system gives to no process that asks for a free one, but lets be named.

    This holds as long as both ends allow the address's reuse and only one of them listens (socket(7), SO_REUSEADDR).
    """
    with socket.socket() as reserving:
        reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserving.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserving.getsockname()[1]}"


def who_mentions(directory: Path) -> list[Process]:
    """Return the processes that have a directory in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with suppress(OSError):
                process = Process.of(int(name))
                if str(directory).encode() in Path(f"/proc/{name}/cmdline").read_bytes() and process.alive:
                    found.append(process)
    return found


async def stick(client: Client, directory: Path, how: str) -> list["asyncio.Task[object]"]:
    """Let both workers hang in C, each with the interpreter lock; return the calls, which are in flight."""
    records = [directory / f"stuck-{number}" for number in range(2)]
    calls: list[asyncio.Task[object]] = []
    for record in records:
        calls.append(asyncio.ensure_future(client.hangs(X, how=how, record=str(record))))
        await until(record.exists, "a worker hangs")
    assert len({record.read_text() for record in records}) == 2
    return calls


async def gone(processes: list[Process], memory: set[int], what: str) -> None:
    """Check that every process and memfd is gone in time, and print how long it took."""
    seconds = await until(lambda: not alive(processes), f"{what}: no process is left", GONE_WITHIN_SECONDS)
    assert not memory & all_memory_files()
    print(f"{what}: nothing left after {seconds:.2f} s")


ENDS = {
    "SIGTERM": ([signal.SIGTERM], {0}),
    "SIGINT": ([signal.SIGINT], {0}),
    "SIGTERM twice": ([signal.SIGTERM, signal.SIGTERM], {128 + signal.SIGTERM}),
    "SIGINT twice": ([signal.SIGINT, signal.SIGINT], {128 + signal.SIGINT}),
    "SIGKILL": ([signal.SIGKILL], {-signal.SIGKILL}),
}


@pytest.mark.alone
@pytest.mark.parametrize(
    ("end", "how"),
    [
        *(("SIGTERM", "nothing"), ("SIGKILL", "nothing")),
        *((end, "sleep") for end in ENDS),
        *(("SIGKILL", "power"), ("SIGKILL", "regex"), ("SIGTERM", "regex")),
    ],
)
async def test_supervisor_leaves_nothing(tmp_path: Path, end: str, how: str) -> None:
    """However the supervisor ends, within two seconds no process and no memory is left, hanging workers included."""
    signals, codes = ENDS[end]
    with serving() as serve:
        async with Client(serve.address, timeout=30.0) as client:
            np.testing.assert_array_equal(await client.echo(np.ones(100_000)), np.ones(100_000))
            calls = await stick(client, tmp_path, how) if how != "nothing" else []
            processes = tree(serve.service.pid)
            # Supervisor, gateway, dispatcher, forkserver and its resource tracker, two workers.
            assert len(processes) == 7, processes
            memory = memory_files(process.pid for process in processes)
            assert memory
            for number, each in enumerate(signals):
                if number:
                    serve.service.wait_for("draining")
                serve.service.signal(each)
            await gone(processes, memory, f"{end}, workers in {how}")
            assert serve.service.wait() in codes
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, UnlatchError)
        if end in ("SIGTERM", "SIGINT"):
            assert not list(serve.directory.iterdir())


async def test_interrupt_of_the_supervisors_group_reaches_it_alone() -> None:
    """A terminal's Ctrl-C: the supervisor stops its children itself, in order, and starts none again."""
    with serving() as serve:
        pids = serve.service.pid, serve.gateway, serve.dispatcher
        assert len({os.getpgid(pid) for pid in pids}) == 3
        os.killpg(os.getpgid(serve.service.pid), signal.SIGINT)
        assert serve.service.wait() == 0
        assert not [line for line in serve.service.lines if "restarting service" in line]


@pytest.mark.parametrize("doing", ["running", "replying"])
async def test_dispatcher_killed_alone_takes_its_workers_along(tmp_path: Path, doing: str) -> None:
    """A killed dispatcher without a supervisor leaves nothing either, whatever its workers are doing."""
    address = tmp_path / "dispatcher.sock"
    with dispatcher_at(address) as dispatcher, gateway_to(address) as gateway:
        gateway.wait_for("replica is ready")
        async with Client(gateway.wait_for("serving")["listen"], timeout=30.0) as client:
            calls = await (stick(client, tmp_path, "sleep") if doing == "running" else reply_half(client, tmp_path))
            processes = tree(dispatcher.pid)
            memory = memory_files(process.pid for process in processes)
            dispatcher.signal(signal.SIGKILL)
            await gone(processes, memory, "SIGKILL of a dispatcher alone, workers in sleep")
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Unavailable)


async def reply_half(client: Client, directory: Path) -> list["asyncio.Task[object]"]:
    """Let both workers hang in the middle of writing a large reply; return the calls, which are in flight."""
    gates = [Gate(directory / f"half-{number}") for number in range(2)]
    x = np.ones(1 << 20)
    calls = [asyncio.ensure_future(client.dies_replying(x, how="hangs", gate=str(gate))) for gate in gates]
    await until(lambda: all(gate.reached for gate in gates), "both replies are half written")
    for gate in gates:
        gate.open()
    return calls


async def test_dispatcher_killed_while_it_starts_workers(tmp_path: Path, at_start: Path) -> None:
    """A forked worker that has not reached its channel yet ends when it finds no dispatcher there."""
    (at_start / "waits.start").touch()
    gate = Gate(at_start / "gate")
    flags = ("--listen", f"unix:{tmp_path / 'dispatcher.sock'}", *ANY_PORTS, "--kernels", str(FAULT_KERNELS))
    with Service("compute", *flags, "--workers", "2") as dispatcher:
        await until(lambda: gate.reached, "a worker starts")
        processes = tree(dispatcher.pid)
        assert gate.pid in {process.pid for process in processes}
        dispatcher.signal(signal.SIGKILL)
        gate.open()
        await gone(processes, set(), "SIGKILL of a dispatcher that starts workers")


async def test_gateway_killed_is_started_again() -> None:
    """A killed gateway comes back on the same address, later each time, and the replica stays as it is."""
    with serving() as serve:
        async with Client(serve.address, timeout=10.0) as client:
            await answered(client)
            replica = tree(serve.dispatcher)
            pauses = []
            for _ in range(2):
                killed, seen = Process.of(serve.gateway), len(serve.service.lines)
                in_flight = asyncio.ensure_future(client.burns(seconds=2.0))
                os.kill(killed.pid, signal.SIGKILL)
                with pytest.raises(Unavailable):
                    await in_flight
                again = await asyncio.to_thread(serve.service.wait_for, "restarting service", after=seen)
                pauses.append(again["after_seconds"])
                await answered(client)
                assert not killed.alive
                assert again["ended_with"] == -signal.SIGKILL
            assert pauses == [0.1, 0.2]
            assert len(alive(replica)) == len(replica)
        serve.service.stop()


async def test_dispatcher_killed_is_started_again(tmp_path: Path) -> None:
    """A killed dispatcher takes all its processes with it, hanging workers too. Another serves the same gateway."""
    with serving() as serve:
        async with Client(serve.address, timeout=10.0) as client:
            await answered(client)
            calls = await stick(client, tmp_path, "sleep")
            gateway, family = Process.of(serve.gateway), tree(serve.dispatcher)
            memory = memory_files(process.pid for process in family)
            os.kill(family[0].pid, signal.SIGKILL)
            await gone(family, memory, "SIGKILL of a dispatcher under serve, workers in sleep")
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, Unavailable)
            await answered(client)
            assert gateway.alive
        serve.service.stop()


async def test_workers_give_way_to_both_loops() -> None:
    """All are in the supervisor's session, within which a nice value counts."""
    with serving() as serve:
        supervisor = serve.service.pid
        everyone = [process.pid for process in tree(supervisor)]
        loops = {supervisor, serve.gateway, serve.dispatcher}
        assert {os.getsid(pid) for pid in everyone} == {os.getsid(supervisor)}
        niceness = {pid: os.getpriority(os.PRIO_PROCESS, pid) for pid in everyone}
        assert sorted(niceness.values())[-2] > max(niceness[pid] for pid in loops)
        serve.service.stop()


TAKEN_NAME = """\
import numpy as np
from jaxtyping import Float64
from unlatch import kernel


@kernel
def identity(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import numpy\n\nimport no_such_module_at_all\n", r"bad.py:3: ModuleNotFoundError"),
        ("x = 1\ny = (\n", r"bad.py:2: SyntaxError"),
        ("raise SystemExit(0)\n", r"bad.py:1: SystemExit"),
        (
            TAKEN_NAME,
            r"bad.py:6: kernel 'identity' is already defined at .*basics.py:\d+",
        ),
        (None, r"bad.py: no such kernel file"),
    ],
    ids=["import fails", "no Python", "exits", "name is taken", "no file"],
)
async def test_wrong_kernels_stop_the_start(tmp_path: Path, text: str | None, says: str) -> None:
    """Kernels that do not load end `serve` with code 2, and file and line on stderr. Nothing is left."""
    module = tmp_path / "bad.py"
    if text is not None:
        module.write_text(text)
    with starting(kernels=str(module)) as serve:
        await complains(serve, says)


@pytest.mark.parametrize(
    "taken", ["listen", "metrics_listen", "health_listen", "compute_metrics_listen", "compute_health_listen"]
)
async def test_taken_port_stops_the_start(taken: str) -> None:
    """An address that another process has ends `serve` with code 2, and the message names it. Nothing is left."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with starting(**{taken: address}) as serve:
            await complains(serve, f"cannot .* {address}")


async def test_sigterm_while_starting() -> None:
    """A supervisor that is stopped before it serves ends with code 0, and nothing is left."""
    with starting() as serve:
        await until(lambda: children(serve.service.pid), "a child is there")
        processes = tree(serve.service.pid)
        serve.service.signal(signal.SIGTERM)
        assert serve.service.wait() == 0, serve.service
        await gone(processes, set(), "SIGTERM while starting")
        assert not list(serve.directory.iterdir())


async def complains(serve: Serve, says: str) -> None:
    """Check that the command ends with code 2 and one line for people."""
    assert serve.service.wait() == 2, serve.service
    said = [line for line in serve.service.lines if not line.startswith("{")]
    assert any(re.search(says, line) for line in said), serve.service
    assert not any("Traceback" in line for line in said), serve.service
    assert not list(serve.directory.iterdir())


async def test_health_and_metrics_ports_are_each_their_own() -> None:
    """Under `serve` both services answer on the ports that their flags name."""
    with serving() as serve:
        for process in ("gateway", "dispatcher"):
            entry = serve.service.wait_for("serving", process=process)
            async with grpc.aio.insecure_channel(entry["health_listen"]) as channel:
                check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
                assert await check(b"") == b"\x08\x01"
        serve.service.stop()
