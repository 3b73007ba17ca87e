"""`unlatch serve`: a killed unit is started again, failed starts end it, and no process outlives it."""

import asyncio
import os
import re
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.mesh.faults.conftest import ANY_PORTS, FAULT_KERNELS, answered, dispatcher_at, gateway_to
from tests.support.mesh import Service
from tests.support.serve import START_SECONDS, Serve, serving, starting
from tests.support.watching import (
    Gate,
    Process,
    Scrape,
    alive,
    all_memory_files,
    children,
    memory_files,
    tree,
    until,
)
from unlatch import Client
from unlatch.common.errors import Aborted, Unavailable, UnlatchError

pytestmark = pytest.mark.asyncio(loop_scope="session")

X = np.arange(3.0)
GONE_WITHIN_SECONDS = 2.0


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
    "SIGHUP": ([signal.SIGHUP], {0}),
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
    with serving(kernels=str(FAULT_KERNELS)) as serve:
        async with Client(serve.address, timeout=30.0) as client:
            np.testing.assert_array_equal(await client.echo(np.ones(100_000)), np.ones(100_000))
            calls = await stick(client, tmp_path, how) if how != "nothing" else []
            processes = tree(serve.service.pid)
            # Supervisor, unit, forkserver, two workers.
            assert len(processes) == 5, processes
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
        if codes == {0}:
            assert not list(serve.directory.iterdir())


async def test_interrupt_of_the_supervisors_group_reaches_it_alone() -> None:
    """A terminal's Ctrl-C: the supervisor stops its unit itself, and does not start it again."""
    with serving(kernels=str(FAULT_KERNELS)) as serve:
        pids = serve.service.pid, serve.unit
        assert len({os.getpgid(pid) for pid in pids}) == 2
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
                assert isinstance(outcome, Aborted)


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


async def test_gateway_killed_leaves_its_replica(tmp_path: Path) -> None:
    """Calls of a killed gateway end ABORTED. The replica stays as it is, and serves the next gateway."""
    address = tmp_path / "dispatcher.sock"
    with dispatcher_at(address) as dispatcher:
        replica = tree(dispatcher.pid)
        for _ in range(2):
            with gateway_to(address) as gateway:
                gateway.wait_for("replica is ready")
                async with Client(gateway.wait_for("serving")["listen"], timeout=10.0) as client:
                    await answered(client)
                    in_flight = asyncio.ensure_future(client.burns(seconds=2.0))
                    gateway.signal(signal.SIGKILL)
                    with pytest.raises(Aborted):
                        await in_flight
        assert len(alive(replica)) == len(replica)
        dispatcher.stop()


async def test_unit_killed_is_started_again(tmp_path: Path) -> None:
    """A killed unit takes all its processes with it, hanging workers too. It comes back on the same address.

    The pause before that is longer each time.
    """
    with serving(kernels=str(FAULT_KERNELS)) as serve:
        async with Client(serve.address, timeout=10.0) as client:
            await answered(client)
            pauses = []
            for number in range(2):
                directory = tmp_path / str(number)
                directory.mkdir()
                calls, seen = await stick(client, directory, "sleep"), len(serve.service.lines)
                family = tree(serve.unit)
                memory = memory_files(process.pid for process in family)
                os.kill(family[0].pid, signal.SIGKILL)
                await gone(family, memory, "SIGKILL of a unit under serve, workers in sleep")
                for outcome in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(outcome, Aborted)
                again = await asyncio.to_thread(serve.service.wait_for, "restarting service", after=seen)
                pauses.append(again["after_seconds"])
                assert again["ended_with"] == -signal.SIGKILL
                await answered(client)
            assert pauses == [0.1, 0.2]
        serve.service.stop()


async def test_stopped_unit_goes_on(tmp_path: Path) -> None:
    """A unit that stands still for longer than several reports take loses no call and no worker."""
    gate = Gate(tmp_path / "gate")
    with serving(kernels=str(FAULT_KERNELS)) as serve:
        async with Client(serve.address, timeout=20.0) as client:
            await answered(client)
            family, seen = tree(serve.unit), len(serve.service.lines)
            running = asyncio.ensure_future(client.waits(X, gate=str(gate)))
            await until(lambda: gate.reached, "a call runs")
            os.kill(serve.unit, signal.SIGSTOP)
            try:
                came_meanwhile = asyncio.ensure_future(client.echo(X))
                await asyncio.sleep(3.0)
                assert not came_meanwhile.done()
            finally:
                os.kill(serve.unit, signal.SIGCONT)
            np.testing.assert_array_equal(await came_meanwhile, X)
            gate.open()
            np.testing.assert_array_equal(await running, X)
            assert tree(serve.unit) == family
            events = [entry["event"] for entry in serve.service.entries[seen:]]
            assert not {"worker ended", "lane to replica broke", "restarting service"} & set(events)
        serve.service.stop()


async def test_unit_stops_under_load(tmp_path: Path) -> None:
    """Until the last moment calls are answered. Then each is refused, and none ends as if it may have had an effect."""
    answers = 0
    # The drain ends with the last call. On a busy machine that takes longer than the default of half a second.
    with serving(kernels=str(FAULT_KERNELS), drain_seconds="20") as serve:

        async def refusal(client: Client, x: np.ndarray[Any, Any]) -> UnlatchError:
            nonlocal answers
            while True:
                try:
                    np.testing.assert_array_equal(await client.doubles_once(x, record=str(record)), x * 2.0)
                except UnlatchError as error:
                    return error
                answers += 1

        record = tmp_path / "record"
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(serve.address, timeout=20.0)) for _ in range(4)]
            sizes = (3, 3, 10_000, 500_000)
            calling = [asyncio.ensure_future(refusal(one, np.full(size, 1.0))) for one in clients for size in sizes]
            await until(lambda: answers > 200, "calls are answered")
            processes = tree(serve.service.pid)
            serve.service.signal(signal.SIGTERM)
            errors = await asyncio.gather(*calling)
            assert {type(error) for error in errors} == {Unavailable}, errors
            assert serve.service.wait() == 0
            await gone(processes, set(), "SIGTERM under load")
            # Each run of a call has been answered.
            assert len(record.read_text().split()) == answers


async def test_workers_give_way_to_the_loops() -> None:
    """All are in the supervisor's session, within which a nice value counts."""
    with serving(kernels=str(FAULT_KERNELS)) as serve:
        supervisor = serve.service.pid
        everyone = [process.pid for process in tree(supervisor)]
        loops = {supervisor, serve.unit}
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
        ("import os\n\nos.abort()\n", "a worker did not start: the forkserver ended as it loaded the kernels"),
        (
            TAKEN_NAME,
            r"bad.py:6: kernel 'identity' is already defined at .*basics.py:\d+",
        ),
        (None, r"bad.py: no such kernel file"),
    ],
    ids=["import fails", "no Python", "exits", "aborts", "name is taken", "no file"],
)
async def test_wrong_kernels_stop_the_start(tmp_path: Path, text: str | None, says: str) -> None:
    """Kernels that do not load end `serve` with code 2, and file and line on stderr. Nothing is left."""
    module = tmp_path / "bad.py"
    if text is not None:
        module.write_text(text)
    with starting(kernels=str(module)) as serve:
        await complains(serve, says)


@pytest.mark.parametrize("taken", ["listen", "metrics_listen", "health_listen"])
async def test_taken_port_stops_the_start(taken: str) -> None:
    """An address that another process has ends `serve` with code 2, and the message names it. Nothing is left."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with starting(None, **{taken: address}) as serve:
            told = f"--{taken.replace('_', '-')} {address}: Address already in use by process {os.getpid()} "
            await complains(serve, re.escape(told))
            # Nothing was loaded before.
            assert not any("serving" in line for line in serve.service.lines)


async def test_sigterm_while_starting() -> None:
    """A supervisor that is stopped before it serves ends with code 0, and nothing is left."""
    with starting(kernels=str(FAULT_KERNELS)) as serve:
        await until(lambda: children(serve.service.pid), "a child is there")
        processes = tree(serve.service.pid)
        serve.service.signal(signal.SIGTERM)
        assert serve.service.wait() == 0, serve.service
        await gone(processes, set(), "SIGTERM while starting")
        assert not list(serve.directory.iterdir())


async def complains(serve: Serve, says: str) -> None:
    """Check that the command ends with code 2 and one line for people."""
    assert serve.service.wait(START_SECONDS) == 2, serve.service
    said = [line for line in serve.service.lines if not line.startswith("{")]
    assert any(re.search(says, line) for line in said), serve.service
    assert not any("Traceback" in line for line in said), serve.service
    assert not list(serve.directory.iterdir())


async def test_unit_has_one_port_for_health_and_one_for_metrics() -> None:
    """Under `serve` both components answer on the ports that the flags name, and their metrics tell them apart."""
    with serving(kernels=str(FAULT_KERNELS)) as serve:
        entry = serve.service.wait_for("serving", process="unit")
        async with (
            grpc.aio.insecure_channel(entry["health_listen"]) as channel,
            Client(entry["listen"], timeout=10.0) as client,
        ):
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert await check(b"") == b"\x08\x01"
            await answered(client)
        metrics = Scrape(entry["metrics_listen"])
        for component in ("gateway", "compute"):
            assert metrics.sum("unlatch_calls_total", kernel="echo", code="OK", component=component) == 1
            assert metrics.sum("unlatch_call_seconds_count", kernel="echo", stage="run", component=component) == 1
        processes = {labels["process"] for labels in metrics.labels("unlatch_process_resident_memory_bytes")}
        assert processes == {"unit", "forkserver", "worker-0", "worker-1"}
        families = [line for line in metrics.text.splitlines() if line.startswith("# TYPE")]
        assert len(families) == len(set(families))
        serve.service.stop()
