"""Kernels that stop loading end readiness, not the process: a replica says why, and is ready again when they load."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from tests.mesh.faults.conftest import ANY_PORTS, answered, gateway_to
from tests.support.mesh import MESHES, Service, unit_service
from tests.support.watching import Gate, Scrape, children, command_of, until, wait_until
from unlatch import Client
from unlatch.common.errors import Aborted, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="session")

X = np.arange(3.0)
GateMaker = Callable[[str], Gate]

GOOD = """\
import numpy as np
import os
from jaxtyping import Float64
from unlatch import kernel


@kernel
def echo(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x


@kernel
def waits(x: Float64[np.ndarray, "n"], *, gate: str) -> Float64[np.ndarray, "n"]:
    with open(gate + ".pid", "w") as file:
        file.write(str(os.getpid()))
    with open(gate, "rb") as opened:
        opened.read(1)
    return x
"""
MORE = """\


@kernel
def doubled(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x * 2
"""
BROKEN = GOOD + "\nimport no_such_module_at_all\n"
BROKEN_LINE = BROKEN.count("\n")
HANGING = GOOD + "\nimport time\ntime.sleep(3600)\n"
# Late enough for the dispatcher to have seen that there was a process.
DYING = GOOD + "\nimport time\nos.register_at_fork(after_in_child=lambda: (time.sleep(0.1), os._exit(7)))\n"
# An import before a fork may hinder every forked process: a lock that is held, a hook.
STUCK = """\


def stick():
    try:
        os.remove(__file__ + ".stick")
    except FileNotFoundError:
        return
    time.sleep(3600)


import time
os.register_at_fork(after_in_child=stick)
"""
# This is far longer than loading takes, and is how long these tests last.
SOON = ("--worker-start-seconds", "10")


@dataclass(frozen=True, kw_only=True)
class Own:
    """A gateway, and a replica that serves one file of kernels. In a unit both are one service."""

    module: Path
    dispatcher: Service
    gateway: Service

    @property
    def address(self) -> str:
        return str(self.gateway.wait_for("serving")["listen"])

    async def is_serving(self, service: str = "") -> bool:
        health = self.dispatcher.wait_for("serving")["health_listen"]
        async with grpc.aio.insecure_channel(health) as channel:
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
            return bool(await check(request) == b"\x08\x01")

    def change(self, text: str) -> None:
        """Replace the file of kernels, so that only running workers have the old ones."""
        self.module.write_text(text)
        for pid in children(self.dispatcher.pid):
            if "worker.forkserver" in command_of(pid):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def own(directory: Path, workers: int, *flags: str, text: str = GOOD, mesh: str = "apart") -> Iterator[Own]:
    """A mesh of this test alone: the two services apart, or a unit. Its replica ends cleanly."""
    module, socket = directory / "mine.py", directory / "dispatcher.sock"
    module.write_text(text)
    arguments = (*ANY_PORTS, "--workers", str(workers), "--kernels", str(module), *flags)
    with ExitStack() as stack:
        if mesh == "unit":
            dispatcher = gateway = stack.enter_context(
                unit_service("--listen", "127.0.0.1:0", "--hold-seconds", "0", *arguments)
            )
        else:
            dispatcher = stack.enter_context(Service("compute", "--listen", f"unix:{socket}", *arguments))
            gateway = stack.enter_context(gateway_to(socket, "--hold-seconds", "0"))
        dispatcher.wait_for("serving")
        gateway.wait_for("replica is ready")
        yield Own(module=module, dispatcher=dispatcher, gateway=gateway)
        family = children(dispatcher.pid)
        dispatcher.stop()
        wait_until(lambda: not [pid for pid in family if Path(f"/proc/{pid}/exe").exists()], "its children have ended")


async def worker_of(client: Client, gate: Gate) -> int:
    """Return the pid of an idle worker."""
    call = asyncio.ensure_future(client.waits(X, gate=str(gate)))
    await until(lambda: gate.reached, "a call runs")
    pid = gate.pid
    gate.open()
    await call
    return pid


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        (BROKEN, (), f"mine.py:{BROKEN_LINE}: ModuleNotFoundError"),
        (DYING, (), "the worker exited with code 7"),
        (HANGING, SOON, "were not loaded within worker_start_seconds=10"),
    ],
    ids=["does not import", "dies in each worker", "hangs"],
)
async def test_kernels_that_stop_loading_end_readiness(
    tmp_path: Path, gate: GateMaker, text: str, flags: tuple[str, ...], says: str, mesh: str
) -> None:
    """Waiting and new calls are refused with file and line, and health and gateway know. The mended file is served."""
    with own(tmp_path, 1, *flags, mesh=mesh) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            here = gate("here")
            running = asyncio.ensure_future(client.waits(X, gate=str(here)))
            await until(lambda: here.reached, "a call runs")
            waiting = [asyncio.ensure_future(client.echo(X)) for _ in range(100)]
            mine.change(text)
            os.kill(here.pid, signal.SIGKILL)
            outcomes = await asyncio.gather(running, *waiting, return_exceptions=True)
            # The running call may have had an effect.
            assert [*map(type, outcomes)] == [Aborted] + [Unavailable] * len(waiting)
            # The replica says why; callers whose calls wait at the gateway hear only that no replica takes calls.
            assert any(says in str(outcome) for outcome in outcomes), outcomes
            await asyncio.to_thread(mine.gateway.wait_for, "replica drains")
            assert not await mine.is_serving()
            assert not await mine.is_serving("unlatch.v1.Lane")
            with pytest.raises(Unavailable, match="no replica takes calls now"):
                await client.echo(X)
            async with Client(mine.address) as late:
                with pytest.raises(Unavailable):
                    await late.echo(X)
            if text is BROKEN:
                metrics = mine.dispatcher.wait_for("serving")["metrics_listen"]
                misfit = "unservable_kernels"
                await until(
                    lambda: Scrape(metrics).sum("unlatch_worker_restarts_total", reason=misfit) >= 3, "it tries again"
                )
            mine.dispatcher.wait_for("replica takes no calls")
            entries = [entry for entry in mine.dispatcher.entries if entry["event"] != "call"]
            said = [entry for entry in entries if says in entry.get("message", "")]
            assert [entry["event"] for entry in said] == ["worker did not start", "replica takes no calls"]
            # A forkserver that has failed to load is not used again, and any other is ended.
            (mine.module.write_text if text is BROKEN else mine.change)(GOOD + MORE)
            await asyncio.to_thread(mine.dispatcher.wait_for, "replica takes calls again")
            await answered(client)
            assert await mine.is_serving()
            # The error is now another one, and callers hear of it.
            np.testing.assert_array_equal(await client.doubled(X), X * 2)


@pytest.mark.parametrize("text", [BROKEN, GOOD + MORE], ids=["broken", "others"])
@pytest.mark.parametrize("mesh", MESHES)
async def test_worker_that_is_left_serves_on(tmp_path: Path, gate: GateMaker, text: str, mesh: str) -> None:
    """While one worker has the kernels the replica serves with it. No worker with other kernels joins it."""
    with own(tmp_path, 2, mesh=mesh) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            mine.change(text)
            os.kill(await worker_of(client, gate("one")), signal.SIGKILL)
            entry = await asyncio.to_thread(mine.dispatcher.wait_for, "worker did not start")
            assert "mine.py" in entry["message"] or "their files have changed" in entry["message"]
            for factor in range(20):
                np.testing.assert_array_equal(await client.echo(X * factor), X * factor)
            assert await mine.is_serving()
            mine.change(GOOD)
            metrics = mine.dispatcher.wait_for("serving")["metrics_listen"]
            await until(lambda: Scrape(metrics).sum("unlatch_worker_up") == 2, "both workers are up", 30.0)


async def test_worker_that_never_becomes_ready_is_ended(tmp_path: Path, gate: GateMaker) -> None:
    """A worker that is stuck in its start is ended after its time.

    The other serves meanwhile, and the next start works.
    """
    with own(tmp_path, 2, *SOON, text=GOOD + STUCK) as mine:
        async with Client(mine.address, timeout=30.0) as client:
            await answered(client)
            mine.module.with_name("mine.py.stick").touch()
            os.kill(await worker_of(client, gate("one")), signal.SIGKILL)
            entry = await asyncio.to_thread(mine.dispatcher.wait_for, "worker did not start")
            assert "the worker was not ready in time" in entry["message"]
            np.testing.assert_array_equal(await client.echo(X), X)
            assert await mine.is_serving()
            metrics = mine.dispatcher.wait_for("serving")["metrics_listen"]
            await until(lambda: Scrape(metrics).sum("unlatch_worker_up") == 2, "both workers are up", 30.0)
