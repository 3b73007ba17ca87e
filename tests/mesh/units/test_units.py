"""`unlatch serve --units 2`: one port, two processes; what the death, reload and restart of one costs the callers."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from tests.support.http2 import Http2
from tests.support.mesh import KERNELS, Service
from tests.support.serve import START_SECONDS, units
from tests.support.watching import Gate, Process, Scrape, until, wait_until
from unlatch import Client
from unlatch.common.errors import ResourceExhausted, UnlatchError
from unlatch.common.kernel.tensors import Array

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(150)]

ANY_PORTS = [part for port in ("", "metrics-", "health-") for part in (f"--{port}listen", "127.0.0.1:0")]
# The system gives each unit some of this number of connections, except once in 30,000 times.
CLIENTS = 16
X = np.arange(3.0)
BYTES = np.arange(64, dtype=np.uint8)
DOUBLES = """
import numpy as np
from jaxtyping import Float64
from unlatch import kernel

@kernel
def times(x: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return x * {factor}
"""


@contextmanager
def two_units(*flags: str, kernels: Path | str = KERNELS, **variables: str) -> Iterator[Service]:
    """Run two units with a worker each, until both take the other's calls. Stop them cleanly at the end."""
    command = "serve", "--units", "2", "--workers", "2", "--kernels", str(kernels), *ANY_PORTS, *flags
    with Service("unlatch", *command, environment=variables) as serve:
        both_serve(serve)
        yield serve
        pids = [Process.of(pid) for pid in units(serve)]
        serve.stop()
        wait_until(lambda: not any(process.alive for process in pids), "no unit is left")


def served_at(serve: Service) -> str:
    """The address of the metrics of both units."""
    return str(serve.wait_for("units share addresses", within=START_SECONDS)["metrics_listen"])


def both_serve(serve: Service) -> None:
    """Wait until each unit has itself and its sibling as a replica, as the metrics tell."""
    for number in range(2):
        serve.wait_for("serving", process=f"unit-{number}", within=START_SECONDS)
    address = served_at(serve)
    wait_until(lambda: Scrape(address).sum("unlatch_replica_up") == 4, "each unit calls both", START_SECONDS)


def listens(serve: Service, name: str = "listen") -> str:
    """The address that both units listen on."""
    (address,) = {str(serve.wait_for("serving", process=f"unit-{number}")[name]) for number in range(2)}
    return address


@asynccontextmanager
async def clients(serve: Service, count: int = CLIENTS, *, call: bool = True) -> AsyncIterator[list[Client]]:
    """Open this number of clients, each with a connection of its own, and make a call of each."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Client(listens(serve), timeout=30.0)) for _ in range(count)]
        for client in made:
            # Else gRPC gives channels of one process to one address the same connection.
            client._options.append(("grpc.use_local_subchannel_pool", 1))
        if call:
            await asyncio.gather(*(client.identity(X) for client in made))
        yield made


async def opened(gate: Gate) -> None:
    """Let the call at a gate go on, once it runs."""
    await until(lambda: gate.reached, "it runs")
    gate.open()


class Callers:
    """Callers that make one call after another of a kernel, until they are told to stop."""

    def __init__(
        self, callers: list[Client], kernel: str = "tripled", x: Array = BYTES, right: Array = BYTES * 3
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._kernel, self._x, self._right = kernel, x, right
        self._stopped = False
        self._running = [asyncio.ensure_future(self._call(client)) for client in callers]

    async def more(self, calls: int = 100) -> None:
        """Wait until this number of further calls have ended."""
        until_then = self.outcomes.total() + calls
        await until(lambda: self.outcomes.total() >= until_then, f"{calls} more calls end", 60.0)

    async def stop(self) -> Counter[str]:
        self._stopped = True
        await asyncio.gather(*self._running)
        return self.outcomes

    async def _call(self, client: Client) -> None:
        while not self._stopped:
            try:
                result = await client.call(self._kernel, self._x)
            except UnlatchError as error:
                self.outcomes[type(error).__name__] += 1
                # As callers do after an error.
                await asyncio.sleep(0.02)
            else:
                self.outcomes["right" if np.array_equal(result, self._right) else "wrong"] += 1


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of tenants of `serve`, without quotas."""
    path = tmp_path_factory.mktemp("units") / "tenants.toml"
    path.write_text("[default]")
    return path


@pytest.fixture(scope="module")
def shared(tenants: Path) -> Iterator[Service]:
    """Two units of all tests here that keep them running."""
    with two_units("--drain-seconds", "20", UNLATCH_TENANTS=str(tenants)) as serve:
        yield serve


@pytest.fixture
def serve(shared: Service) -> Service:
    """Both units, whatever a test before has done to one of them."""
    both_serve(shared)
    return shared


async def test_unit_sends_calls_to_an_idle_sibling(serve: Service, tmp_path: Path) -> None:
    """Calls of one client, none of which ends, to units with one worker each: each unit runs one."""
    gates = [Gate(tmp_path / f"gate-{number}") for number in range(4)]
    async with clients(serve, 1) as (client,):
        calls = [asyncio.ensure_future(client.waits_for(path=str(gate))) for gate in gates]
        await until(lambda: sum(gate.reached for gate in gates) == 2, "two run")
        for gate in gates:
            await opened(gate)
        await asyncio.gather(*calls)


async def test_killed_unit_costs_its_own_calls(serve: Service) -> None:
    """A killed unit's callers hear of it at once, its siblings' callers never do, and it is started again."""
    async with clients(serve) as made:
        callers = Callers(made)
        for _ in range(3):
            await callers.more()
            os.kill(min(units(serve)), signal.SIGKILL)
            await asyncio.to_thread(both_serve, serve)
        await callers.more(400)
        outcomes = await callers.stop()
    assert outcomes["wrong"] == 0
    assert outcomes["right"] > 400
    # The kernel is pure. A caller hears only that its connection broke.
    assert set(outcomes) <= {"right", "wrong", "Unavailable"}
    # Each client has one call in flight, so a death costs each client of that unit one call at most.
    assert 0 < outcomes["Unavailable"] <= 3 * CLIENTS


async def test_stopped_unit_gets_no_calls_of_its_siblings(serve: Service) -> None:
    """While a unit stands still, callers of its sibling are answered. The unit's own callers wait for it."""
    async with clients(serve) as made:
        victim, after = min(units(serve)), len(serve.lines)
        os.kill(victim, signal.SIGSTOP)
        try:
            calls = [asyncio.ensure_future(client.tripled(BYTES)) for client in made]
            await asyncio.to_thread(serve.wait_for, "lane to replica broke", after=after, within=START_SECONDS)
            await until(lambda: any(call.done() for call in calls), "the sibling answers")
            answered = [client for client, call in zip(made, calls, strict=True) if call.done()]
            assert len(answered) < CLIENTS
            # More than the sibling's worker runs at a time.
            await asyncio.gather(*(client.burns(seconds=0.01) for client in answered for _ in range(8)))
        finally:
            os.kill(victim, signal.SIGCONT)
        await asyncio.gather(*calls)


async def test_kernels_are_reloaded_in_one_unit_after_another(tmp_path: Path) -> None:
    """`--reload` under load: no call fails, and afterwards both units have the new kernel."""
    kernels = tmp_path / "kernels.py"
    kernels.write_text(DOUBLES.format(factor=2))
    with two_units("--reload", kernels=kernels) as serve:
        serve.wait_for("watching kernels")
        async with clients(serve) as made:
            callers = Callers(made, "times", X, X * 2)
            await callers.more()
            kernels.write_text(DOUBLES.format(factor=2) + "# edited\n")
            await asyncio.to_thread(serve.wait_for, "kernels reloaded", within=START_SECONDS)
            await callers.more()
            assert await callers.stop() == {"right": callers.outcomes["right"]}
            kernels.write_text(DOUBLES.format(factor=5))
            after = len(serve.lines)
            await asyncio.to_thread(serve.wait_for, "kernels reloaded", after=after, within=START_SECONDS)
            for result in await asyncio.gather(*(client.times(X) for client in made)):
                np.testing.assert_array_equal(result, X * 5)


async def test_units_are_restarted_one_after_another(serve: Service) -> None:
    """SIGUSR2 under load: both units are others afterwards, and no call failed."""
    before = set(units(serve))
    async with clients(serve) as made:
        callers = Callers(made)
        await callers.more()
        after = len(serve.lines)
        serve.signal(signal.SIGUSR2)
        await asyncio.to_thread(serve.wait_for, "units restarted", after=after, within=2 * START_SECONDS)
        await callers.more()
        outcomes = await callers.stop()
    assert not before & set(units(serve))
    assert outcomes == {"right": outcomes["right"]}


def replace_tenants(serve: Service, tenants: Path, text: str) -> None:
    """Replace the file of tenants, and wait until both units have read it."""
    after = len(serve.lines)
    beside = tenants.with_suffix(".new")
    beside.write_text(text)
    beside.replace(tenants)
    for number in range(2):
        serve.wait_for("file replaced", process=f"unit-{number}", after=after, within=START_SECONDS)


@asynccontextmanager
async def limited(serve: Service, tenants: Path, limits: str) -> AsyncIterator[None]:
    """Limit all callers, who are one tenant, until the block ends."""
    await asyncio.to_thread(replace_tenants, serve, tenants, f"[default]\n{limits}")
    try:
        yield
    finally:
        await asyncio.to_thread(replace_tenants, serve, tenants, "[default]")


async def test_quotas_hold_for_both_units_together(serve: Service, tenants: Path) -> None:
    """Calls at both units are taken from one bucket, also by the unit that is started in the place of a killed one."""
    async with (
        clients(serve) as made,
        limited(serve, tenants, f"calls_per_second = 0.001\nburst_calls = {2 * CLIENTS}"),
    ):
        calls = (client.identity(X) for client in made * 4)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        refused = [one for one in outcomes if isinstance(one, ResourceExhausted)]
        # The last token may be taken at each unit at the same moment.
        assert len(outcomes) - len(refused) in {2 * CLIENTS, 2 * CLIENTS + 1}
        assert {one.quota for one in refused} == {"tenant:"}
        os.kill(min(units(serve)), signal.SIGKILL)
        await asyncio.to_thread(both_serve, serve)
        async with clients(serve, call=False) as others:
            for client in others:
                with pytest.raises(ResourceExhausted, match="calls_per_second"):
                    await client.identity(X)


async def test_bounds_hold_for_both_units_together(tmp_path: Path) -> None:
    """Wherever connections come to, one client may use the whole of a bound, and at a full bound each unit refuses."""
    gates = [Gate(tmp_path / f"gate-{number}") for number in range(4)]
    with two_units(UNLATCH_MAX_LIVE_CALLS="20", UNLATCH_MAX_LANES=str(CLIENTS)) as serve:
        async with clients(serve) as (client, *others):
            held = [asyncio.ensure_future(client.waits_for(path=str(gate))) for gate in gates]
            await until(lambda: sum(gate.reached for gate in gates) == 2, "both workers are busy")
            waiting = [asyncio.ensure_future(client.tripled(BYTES)) for _ in range(16)]
            await until(lambda: Scrape(served_at(serve)).sum("unlatch_calls_in_flight") == 20, "20 calls wait")
            for one in (client, *others):
                with pytest.raises(ResourceExhausted, match="max_live_calls=20 already"):
                    await one.identity(X)
            with Http2(listens(serve)) as connection:
                refusal = connection.trailers(connection.begin("/unlatch.v1.Lane/Open"))
            assert f"max_lanes={CLIENTS} open already" in refusal["grpc-message"]
            for gate in gates:
                await opened(gate)
            for result in await asyncio.gather(*waiting):
                np.testing.assert_array_equal(result, BYTES * 3)
            await asyncio.gather(*held, *(one.identity(X) for one in others))


async def test_health_is_the_machines(serve: Service) -> None:
    """Each unit says that calls are taken while any unit takes them."""
    address = listens(serve, "health_listen")
    for _ in range(CLIENTS):
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            check: Any = channel.unary_unary(
                "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
            )
            assert (await check(b"", timeout=10.0)).status == health_pb2.HealthCheckResponse.SERVING


async def test_port_in_use_is_refused(serve: Service) -> None:
    """A second `unlatch serve` does not share the port of the first, with several units or one."""
    taken = listens(serve)
    for number in ("2", "1"):
        flags = "--units", number, "--workers", "2", "--listen", taken, *ANY_PORTS[2:]
        with Service("unlatch", "serve", *flags) as second:
            assert second.wait(START_SECONDS) == 2
            assert f"--listen {taken}: Address already in use" in "\n".join(second.lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--units", "3", "--workers", "2"), "--units 3 is more than the workers (2): each unit needs one"),
        (("--units", "2", "--workers", "2", "--listen", "unix:/tmp/x"), "--listen unix:/tmp/x: several units need"),
    ],
)
async def test_impossible_units_are_refused(flags: tuple[str, ...], message: str) -> None:
    """Settings that do not fit together are named."""
    with Service("unlatch", "serve", *flags) as serve:
        assert serve.wait(START_SECONDS) == 2
        assert message in "\n".join(serve.lines)
