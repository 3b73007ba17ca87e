"""Drain, health and broken lanes: who is informed, answered and refused, and when the process ends."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.mesh.faults.conftest import answered, dispatcher_at, gateway_to, unit_at
from tests.support.doors import arrays_of, vector
from tests.support.mesh import Service, running_dispatcher
from tests.support.watching import Gate, Scrape, until
from unlatch import Client
from unlatch.common.errors import Aborted, Unavailable, UnlatchError
from unlatch.common.service.health import LIVENESS
from unlatch.protos.inference_pb2 import ModelInferRequest, ModelInferResponse

pytestmark = pytest.mark.asyncio(loop_scope="session")

X = np.arange(3.0)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
GateMaker = Callable[[str], Gate]


@contextmanager
def services(socket: Path, ending: str, drain_seconds: str, *flags: str) -> Iterator[tuple[Service, Service]]:
    """Run gateway and replica, apart or as a unit, that may end in any way. Yields the gateway and the one named.

    The flags are the replica's.
    """
    drain = ("--drain-seconds", drain_seconds)
    if ending == "unit":
        with unit_at("127.0.0.1:0", *drain, *flags) as unit:
            yield unit, unit
        return
    with (
        dispatcher_at(socket, *drain, *flags) as dispatcher,
        gateway_to(socket, *drain, "--hold-seconds", "0") as gateway,
    ):
        gateway.wait_for("replica is ready")
        yield gateway, gateway if ending == "gateway" else dispatcher


@asynccontextmanager
async def watched(address: str, service: str = "") -> AsyncIterator[Any]:
    """A health Watch: await its `read`."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30)
        yield watch
        watch.cancel()


async def status(watch: Any) -> int:
    answer: health_pb2.HealthCheckResponse = await asyncio.wait_for(watch.read(), 10)
    return answer.status


async def infer(channel: grpc.aio.Channel, message: ModelInferRequest) -> ModelInferResponse:
    """Make a call through the Open Inference Protocol's door."""
    rpc: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    answer: bytes = await rpc(message.SerializeToString(), timeout=20)
    return ModelInferResponse.FromString(answer)


@pytest.mark.parametrize("draining", ["gateway", "dispatcher", "unit"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drain(tmp_path: Path, gate: GateMaker, draining: str, number: signal.Signals) -> None:
    """A stopped service reports NOT_SERVING, answers the calls in flight, and ends with 0.

    Meanwhile a gateway answers new calls on open connections, and a replica refuses them at once. Both report that they
    are alive.
    """
    lane_gate, door_gate = gate("lane"), gate("door")
    with services(tmp_path / "dispatcher.sock", draining, "30", "--workers", "3") as (gateway, ending):
        address = gateway.wait_for("serving")["listen"]
        async with (
            Client(address, timeout=20.0) as client,
            grpc.aio.insecure_channel(address) as channel,
            watched(ending.wait_for("serving")["health_listen"]) as watch,
            watched(gateway.wait_for("serving")["health_listen"]) as gateway_watch,
        ):
            assert await status(watch) == SERVING
            assert await status(gateway_watch) == SERVING
            by_lane = asyncio.ensure_future(client.waits(X, gate=str(lane_gate)))
            by_door = asyncio.ensure_future(infer(channel, vector("waits", 5.0, gate=str(door_gate))))
            await until(lambda: lane_gate.reached and door_gate.reached, "both calls run")
            ending.signal(number)
            assert await status(watch) == NOT_SERVING
            async with watched(ending.wait_for("serving")["health_listen"], LIVENESS) as alive:
                assert await status(alive) == SERVING
            # A gateway whose only replica drains takes no calls either.
            assert await status(gateway_watch) == NOT_SERVING
            if draining != "dispatcher":
                np.testing.assert_array_equal(await client.echo(X), X)
                assert arrays_of(await infer(channel, vector("echo", 1.0)))[0].tolist() == [1.0]
            else:
                with pytest.raises(Unavailable):
                    await client.echo(X)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await infer(channel, vector("echo", 1.0))
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            # At once: running calls wait for what only this test can give them.
            assert not by_lane.done()
            assert not by_door.done()
            lane_gate.open()
            door_gate.open()
            np.testing.assert_array_equal(await by_lane, X)
            assert arrays_of(await by_door)[0].tolist() == [5.0]
            assert await asyncio.to_thread(ending.wait) == 0


async def test_draining_gateway_refuses_connections_and_at_last_calls(tmp_path: Path) -> None:
    """Callers that stay are answered for two thirds of the drain, and then refused UNAVAILABLE. None can come anew."""
    socket = tmp_path / "dispatcher.sock"
    with dispatcher_at(socket), gateway_to(socket, "--drain-seconds", "3") as gateway:
        gateway.wait_for("replica is ready")
        address = gateway.wait_for("serving")["listen"]
        async with Client(address, timeout=20.0) as client, grpc.aio.insecure_channel(address) as channel:

            async def served_until_refused(call: Callable[[], Awaitable[Any]]) -> tuple[float, str]:
                began = time.monotonic()
                while True:
                    try:
                        await call()
                    # ABORTED would say that a call of the lane may have begun.
                    except (Unavailable, grpc.aio.AioRpcError) as error:
                        return time.monotonic() - began, str(error)
                    await asyncio.sleep(0.02)

            await client.echo(X)
            await infer(channel, vector("echo", 1.0))
            gateway.signal(signal.SIGTERM)
            await asyncio.to_thread(gateway.wait_for, "draining")
            stay = asyncio.gather(
                served_until_refused(lambda: client.echo(X)),
                served_until_refused(lambda: infer(channel, vector("echo", 1.0))),
            )
            await asyncio.sleep(0.2)
            host, _, port = address.rpartition(":")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(host, int(port))
            for seconds, message in await stay:
                assert re.search("takes no new calls|StatusCode.(UNAVAILABLE|CANCELLED)|the lane to .* broke", message)
                assert 1.5 <= seconds < 3.0
            assert await asyncio.to_thread(gateway.wait) == 0


@pytest.mark.parametrize("draining", ["gateway", "dispatcher", "unit"])
async def test_drain_is_bounded(tmp_path: Path, gate: GateMaker, draining: str) -> None:
    """A call that takes longer than `drain_seconds` ends ABORTED, and the process still ends with 0."""
    here = gate("here")
    with services(tmp_path / "dispatcher.sock", draining, "0.3") as (gateway, ending):
        async with Client(gateway.wait_for("serving")["listen"], timeout=20.0) as client:
            call = asyncio.ensure_future(client.waits(X, gate=str(here)))
            await until(lambda: here.reached, "the call runs")
            ending.signal(signal.SIGTERM)
            with pytest.raises(Aborted):
                await call
            assert await asyncio.to_thread(ending.wait) == 0
            ending.wait_for("drain timed out")


@pytest.mark.parametrize("ending", [("gateway", "dispatcher"), ("unit",)], ids="-".join)
async def test_second_signal_ends_at_once(tmp_path: Path, gate: GateMaker, ending: tuple[str, ...]) -> None:
    """The second signal does not wait for anything."""
    here = gate("here")
    with services(tmp_path / "dispatcher.sock", ending[-1], "60") as (gateway, last):
        async with Client(gateway.wait_for("serving")["listen"], timeout=20.0) as client:
            call = asyncio.ensure_future(client.waits(X, gate=str(here)))
            await until(lambda: here.reached, "the call runs")
            for service in dict.fromkeys((gateway, last)):
                service.signal(signal.SIGTERM)
                await asyncio.to_thread(service.wait_for, "draining")
                service.signal(signal.SIGTERM)
                # The running call has no end, and the drain would take a minute.
                assert await asyncio.to_thread(service.wait) == 128 + signal.SIGTERM
            with pytest.raises(Aborted):
                await call


async def test_calls_held_for_a_window_hear_of_a_broken_lane(tmp_path: Path, gate: GateMaker) -> None:
    """When a replica dies, calls that the gateway holds for want of room end UNAVAILABLE at once.

    Those that were sent end ABORTED, since they may have had an effect.
    """
    socket, here = tmp_path / "dispatcher.sock", gate("here")
    with (
        dispatcher_at(socket, "--window-calls", "2") as dispatcher,
        gateway_to(socket, "--hold-seconds", "0") as gateway,
    ):
        gateway.wait_for("replica is ready")
        entry = gateway.wait_for("serving")
        async with Client(entry["listen"], timeout=600.0) as client:
            running = asyncio.ensure_future(client.waits(X, gate=str(here)))
            await until(lambda: here.reached, "a call runs")
            others = [asyncio.ensure_future(client.hangs(X, how="sleep", record=str(tmp_path / "on")))]
            others += [asyncio.ensure_future(client.echo(X)) for _ in range(5)]
            await until(lambda: Scrape(entry["metrics_listen"]).sum("unlatch_queue_depth") == 5, "five are held")
            dispatcher.signal(signal.SIGKILL)
            # At once, though each of them has the client's timeout.
            ended = asyncio.gather(running, *others, return_exceptions=True)
            assert [*map(type, await asyncio.wait_for(ended, 10.0))] == [Aborted] * 2 + [Unavailable] * 5


async def test_health_follows_the_replica(tmp_path: Path) -> None:
    """A gateway is NOT_SERVING without a replica and SERVING with one, and every watcher is informed.

    Without a replica it still reports that it is alive.
    """
    socket = tmp_path / "dispatcher.sock"
    with gateway_to(socket) as gateway:
        entry = gateway.wait_for("serving")
        services = ("", "inference.GRPCInferenceService", "unlatch.v1.Lane")
        async with (
            watched(entry["health_listen"]) as whole,
            watched(entry["health_listen"], services[1]) as door,
            watched(entry["health_listen"], services[2]) as lane,
            watched(entry["health_listen"], "no.such.Service") as unknown,
            grpc.aio.insecure_channel(entry["health_listen"]) as channel,
            Client(entry["listen"]) as client,
        ):
            watches = (whole, door, lane)
            assert await status(unknown) == UNKNOWN
            assert [await status(watch) for watch in watches] == [NOT_SERVING] * 3
            stub: Any = health_pb2_grpc.HealthStub(channel)
            check = stub.Check
            assert (await check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            assert (await check(health_pb2.HealthCheckRequest(service=LIVENESS))).status == SERVING
            with pytest.raises(Unavailable, match="no ready replica"):
                await client.call("echo", X)
            with dispatcher_at(socket) as dispatcher:
                assert [await status(watch) for watch in watches] == [SERVING] * 3
                for service in services:
                    assert (await check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
                # A watcher that leaves affects no other.
                door.cancel()
                async with Client(entry["listen"]) as other:
                    np.testing.assert_array_equal(await other.echo(X), X)
                await answered(client)
                dispatcher.signal(signal.SIGKILL)
                assert [await status(watch) for watch in (whole, lane)] == [NOT_SERVING] * 2
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await check(health_pb2.HealthCheckRequest(service="no.such.Service"))
            assert refused.value.code() == grpc.StatusCode.NOT_FOUND
            assert (await check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        gateway.stop()


async def test_replica_says_when_it_serves(tmp_path: Path) -> None:
    """A replica's own health answers for its lane and its life, and for no other service."""
    with running_dispatcher(tmp_path / "dispatcher.sock") as dispatcher:
        address = dispatcher.wait_for("serving")["health_listen"]
        for service, expected in {
            "": SERVING,
            LIVENESS: SERVING,
            "unlatch.v1.Lane": SERVING,
            "inference.X": UNKNOWN,
        }.items():
            async with watched(address, service) as watch:
                assert await status(watch) == expected


async def test_reflection_lists_services(tmp_path: Path) -> None:
    """Gateway, replica and both health ports list their services by reflection."""
    socket = tmp_path / "dispatcher.sock"
    with running_dispatcher(socket) as dispatcher, gateway_to(socket) as gateway:
        door, replica = gateway.wait_for("serving"), dispatcher.wait_for("serving")
        expected = {
            door["listen"]: {"inference.GRPCInferenceService", "unlatch.v1.Lane"},
            replica["listen"]: {"unlatch.v1.Lane"},
            door["health_listen"]: {"grpc.health.v1.Health"},
            replica["health_listen"]: {"grpc.health.v1.Health"},
        }
        for address, services in expected.items():
            async with grpc.aio.insecure_channel(address) as channel:
                stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # or an aio one
                request: Any = reflection_pb2.ServerReflectionRequest
                asked = iter([request(list_services="")])
                answers = [answer async for answer in stub.ServerReflectionInfo(asked, timeout=10)]
            listed = {service.name for service in answers[0].list_services_response.service}
            assert services <= listed, listed
            assert listed - services == {"grpc.reflection.v1alpha.ServerReflection"}
        gateway.stop()


async def test_replica_that_comes_back_is_used(tmp_path: Path) -> None:
    """A client's lane stays open through a replica's restart, and its next call is answered."""
    socket = tmp_path / "dispatcher.sock"
    with gateway_to(socket) as gateway:
        async with Client(gateway.wait_for("serving")["listen"], timeout=5.0) as client:
            for _ in range(2):
                seen = len(gateway.lines)
                with dispatcher_at(socket) as dispatcher:
                    await asyncio.to_thread(gateway.wait_for, "replica is ready", after=seen)
                    await answered(client)
                    dispatcher.signal(signal.SIGKILL)
                    await asyncio.to_thread(gateway.wait_for, "lane to replica broke", after=seen)
                with pytest.raises(UnlatchError):
                    await client.echo(X)
        gateway.stop()
