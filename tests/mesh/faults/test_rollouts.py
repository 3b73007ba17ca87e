"""Rollouts under load by both doors: of gateways behind a balancer of connections, and of a replica behind a DNS cache.

The gateways, their replica, the callers and the connections are real. The balancer knows nothing of gRPC or of health:
each new connection goes to the next gateway that accepts one, as a Service of Kubernetes or a plain TCP proxy does.
"""

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from tests.mesh.faults.conftest import ANY_PORTS, FAULT_KERNELS, dispatcher_at, gateway_to
from tests.support.dns import NameServer
from tests.support.doors import arrays_of, vector
from tests.support.mesh import Service
from tests.support.watching import until
from unlatch import Client
from unlatch.common.errors import DeadlineExceeded, Unavailable
from unlatch.protos.inference_pb2 import ModelInferResponse

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Connections that callers keep open, at each door, and calls a second of all of them.
CONNECTIONS = 4
CALLS_A_SECOND = 100
# kubeadm's cache has 30 s: DNS_CACHE_SECONDS=30 make test ARGS="-k dns_cache" takes five minutes.
CACHE_SECONDS = float(os.environ.get("DNS_CACHE_SECONDS", "3"))
# Calls that come while the cache tells of the replica that ended wait for as long.
WAIT_SECONDS = 20.0 + 2 * CACHE_SECONDS


class Balancer:
    """Pass each connection on to one of the targets, in turn. A target that refuses it is passed over."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.address = ""
        self._turn = 0
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> asyncio.Server:
        """Listen on a free port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def close(self) -> None:
        """Break every connection."""
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        with suppress(asyncio.CancelledError, OSError):
            await self._pass_on(reader, writer)
        writer.close()
        self._open.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._turn += 1
        first, targets = self._turn, list(self.targets)
        for number in range(len(targets)):
            host, _, port = targets[(first + number) % len(targets)].rpartition(":")
            try:
                there, back = await asyncio.open_connection(host, int(port))
            except OSError:
                continue
            try:
                await asyncio.gather(_copied(reader, back), _copied(there, writer))
            finally:
                back.close()
            return


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()


@asynccontextmanager
async def balanced() -> AsyncIterator[Balancer]:
    """Run a balancer."""
    balancer = Balancer()
    async with await balancer.start():
        yield balancer
        await balancer.close()


class Load:
    """Calls at a fixed rate by every caller in turn, whatever becomes of earlier ones."""

    def __init__(self, callers: list[Callable[[float], Awaitable[float]]]) -> None:
        self.ended: Counter[str] = Counter()
        self._callers = callers
        self._calls: set[asyncio.Task[None]] = set()
        self._sending = asyncio.create_task(self._send())

    @property
    def answered(self) -> int:
        return self.ended["OK"]

    async def more(self, calls: int) -> None:
        """Wait until more calls have been answered."""
        wanted = self.answered + calls
        await until(lambda: self.answered >= wanted, "calls are answered", 10.0 + WAIT_SECONDS)

    async def end(self) -> dict[str, int]:
        """Stop, wait for the calls that are under way, and return how calls ended that were not answered."""
        self._sending.cancel()
        await asyncio.gather(*self._calls)
        return {how: number for how, number in self.ended.items() if how != "OK"}

    async def _send(self) -> None:
        number = 0
        while True:
            number += 1
            task = asyncio.create_task(self._call(self._callers[number % len(self._callers)], float(number)))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            await asyncio.sleep(1 / CALLS_A_SECOND)

    async def _call(self, call: Callable[[float], Awaitable[float]], value: float) -> None:
        try:
            answer = await call(value)
        except Exception as error:  # noqa: BLE001 (counted; the test looks at it)
            self.ended[f"{type(error).__name__}: {error}"] += 1
        else:
            self.ended["OK" if answer == value else "wrong answer"] += 1


def by_lane(client: Client) -> Callable[[float], Awaitable[float]]:
    """Call by a lane."""

    async def call(value: float) -> float:
        return float((await client.echo(np.array([value]), timeout=WAIT_SECONDS))[0])

    return call


def by_protocol(channel: grpc.aio.Channel) -> Callable[[float], Awaitable[float]]:
    """Call by the Open Inference Protocol."""
    infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    async def call(value: float) -> float:
        answer: bytes = await infer(vector("echo", value).SerializeToString(), timeout=WAIT_SECONDS)
        return float(arrays_of(ModelInferResponse.FromString(answer))[0][0])

    return call


@asynccontextmanager
async def load_on(address: str, *, channels: int = CONNECTIONS) -> AsyncIterator[Load]:
    """Call by lanes, and by the protocol on so many channels, each on connections of its own."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    opened = [grpc.aio.insecure_channel(address, options=own) for _ in range(channels)]
    clients = [Client(address) for _ in range(CONNECTIONS)]
    load = Load([*map(by_lane, clients), *map(by_protocol, opened)])
    yield load
    await load.end()
    await asyncio.gather(*(client.close() for client in clients), *(channel.close() for channel in opened))


def free_port() -> int:
    """Return a port that is free on every address of this machine."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def address_of(gateway: Service) -> str:
    """Return where a gateway listens."""
    listen: str = gateway.wait_for("serving")["listen"]
    return listen


@pytest.mark.timeout(300)
async def test_rollouts_of_gateways_cost_no_call(tmp_path: Path) -> None:
    """Ten times another gateway takes the place of one of two: no call of either door fails, and each one ends with 0.

    No drain lasts for its whole time, though calls never cease.
    """
    flags = ("--connection-seconds", "1", "--drain-seconds", "10")
    with ExitStack() as stack:
        stack.enter_context(dispatcher_at(tmp_path / "dispatcher.sock"))

        def another() -> Service:
            gateway = stack.enter_context(gateway_to(tmp_path / "dispatcher.sock", *flags))
            gateway.wait_for("replica is ready")
            return gateway

        gateways = [await asyncio.to_thread(another) for _ in range(2)]
        async with balanced() as balancer:
            balancer.targets = [address_of(gateway) for gateway in gateways]
            async with load_on(balancer.address) as load:
                await load.more(50)
                for _ in range(10):
                    gateways.append(await asyncio.to_thread(another))
                    # The balancer learns of the new gateway, and never that the old one ends.
                    balancer.targets.append(address_of(gateways[-1]))
                    ending = gateways.pop(0)
                    await asyncio.to_thread(ending.stop)
                    assert not [entry for entry in ending.entries if entry["event"] == "drain timed out"], ending
                    await load.more(50)
                assert await load.end() == {}


@pytest.mark.timeout(300)
async def test_client_sends_calls_again_that_a_gateway_has_not_begun(tmp_path: Path) -> None:
    """Gateways end before clients can move, and refuse calls or do not read them: the client sends them elsewhere."""
    with ExitStack() as stack:
        stack.enter_context(dispatcher_at(tmp_path / "dispatcher.sock"))

        def another() -> Service:
            # Clients wait for up to 0.25 s before they open another lane.
            gateway = stack.enter_context(gateway_to(tmp_path / "dispatcher.sock", "--drain-seconds", "0.3"))
            gateway.wait_for("replica is ready")
            return gateway

        gateways = [await asyncio.to_thread(another) for _ in range(2)]
        async with balanced() as balancer:
            balancer.targets = [address_of(gateway) for gateway in gateways]
            async with load_on(balancer.address, channels=0) as load:
                await load.more(50)
                for _ in range(5):
                    gateways.append(await asyncio.to_thread(another))
                    balancer.targets.append(address_of(gateways[-1]))
                    await asyncio.to_thread(gateways.pop(0).stop)
                    await load.more(50)
                assert await load.end() == {}


@pytest.mark.timeout(300 + 20 * CACHE_SECONDS)
async def test_restarts_of_the_one_replica_behind_a_dns_cache_cost_no_call(tmp_path: Path) -> None:
    """Ten times the only replica is replaced by one at another address, of which the cache tells too late.

    The new replica is ready before the old one ends. Meanwhile calls wait, clients see the kernels, and health is
    SERVING.
    """
    port = free_port()
    with ExitStack() as stack:

        def another(host: str) -> Service:
            arguments = ("--listen", f"{host}:{port}", *ANY_PORTS, "--workers", "1", "--kernels", str(FAULT_KERNELS))
            replica = stack.enter_context(Service("compute", *arguments))
            replica.wait_for("serving")
            return replica

        hosts = [f"127.0.0.{last}" for last in range(2, 13)]
        replica = await asyncio.to_thread(another, hosts[0])
        names = stack.enter_context(NameServer(hosts[0], cache_seconds=CACHE_SECONDS))
        target = f"dns://{names.target}/replicas.test:{port}"
        flags = ("--listen", "127.0.0.1:0", *ANY_PORTS, "--discovery-seconds", "0.1")
        gateway = stack.enter_context(Service("gateway", "--replicas", target, *flags))
        await asyncio.to_thread(gateway.wait_for, "replica is ready")
        async with load_on(address_of(gateway)) as load:
            await load.more(50)
            for host in hosts[1:]:
                ending, replica = replica, await asyncio.to_thread(another, host)
                names.addresses = [host]
                before = len(gateway.lines)
                await asyncio.to_thread(ending.stop)
                await asyncio.to_thread(
                    gateway.wait_for, "replica is ready", after=before, within=WAIT_SECONDS, replica=f"{host}:{port}"
                )
                await load.more(50)
            assert await load.end() == {}
        assert any(entry["event"] == "no replica takes calls, they wait" for entry in gateway.entries)


async def test_calls_wait_for_a_replica_no_longer_than_they_may(tmp_path: Path) -> None:
    """A call that waits for a replica ends at its deadline, or UNAVAILABLE when it has waited for `hold_seconds`.

    So does a call that comes when there has been no replica for longer.
    """
    with ExitStack() as stack:
        port = free_port()
        arguments = ("--listen", f"127.0.0.1:{port}", *ANY_PORTS, "--workers", "1", "--kernels", str(FAULT_KERNELS))
        replica = stack.enter_context(Service("compute", *arguments))
        replica.wait_for("serving")
        names = stack.enter_context(NameServer("127.0.0.1"))
        flags = ("--listen", "127.0.0.1:0", *ANY_PORTS, "--discovery-seconds", "0.1", "--hold-seconds", "2")
        target = f"dns://{names.target}/replicas.test:{port}"
        gateway = stack.enter_context(Service("gateway", "--replicas", target, *flags))
        await asyncio.to_thread(gateway.wait_for, "replica is ready")
        x = np.arange(3.0)
        async with Client(address_of(gateway)) as client:
            await client.echo(x)
            await asyncio.to_thread(replica.stop)
            # The end of the replica's process may take seconds on a busy machine.
            began = time.monotonic()
            calls = [asyncio.ensure_future(client.echo(x, timeout=seconds)) for seconds in (0.3, 20.0)]
            with pytest.raises(DeadlineExceeded):
                await calls[0]
            assert time.monotonic() - began < 2.0
            with pytest.raises(Unavailable, match="no replica takes calls now"):
                await calls[1]
            assert 2.0 < time.monotonic() - began < 5.0
            began = time.monotonic()
            with pytest.raises(Unavailable, match="no replica takes calls now"):
                await client.echo(x, timeout=20.0)
            assert 1.9 < time.monotonic() - began < 5.0
