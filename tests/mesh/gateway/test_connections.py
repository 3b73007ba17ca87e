"""Connections beyond what a service has descriptors for are closed at once, logged, and visible in metrics."""

import re
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.support.mesh import Service
from tests.support.watching import Scrape, until
from unlatch import Client

pytestmark = pytest.mark.asyncio(loop_scope="session")

ANY_PORTS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
LIMITED = ("sh", "-c", 'ulimit -n "$0"; exec "$@"')


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[str]:
    address = f"unix:{tmp_path}/compute.sock"
    with Service("compute", "--listen", address, *ANY_PORTS, "--workers", "1") as service:
        service.wait_for("serving", within=60)
        yield address
        service.stop()


def limited(descriptors: int, *flags: str) -> Service:
    """A gateway that may have so many descriptors."""
    runner = (*LIMITED, str(descriptors), sys.executable, "-m")
    return Service("unlatch.gateway", "--listen", "127.0.0.1:0", *ANY_PORTS, *flags, runner=runner)


async def test_connections_beyond_the_descriptors_are_closed(replica: str) -> None:
    """With 64 descriptors and 80 connections, some are served, the others are closed, and none hangs."""
    with limited(64, "--replicas", replica) as gateway, ExitStack() as opened:
        serving = gateway.wait_for("serving", within=60)
        told = gateway.wait_for("fewer connections than max_connections", descriptor_limit=64)
        bound = told["connections"]
        assert 0 < bound < 64
        host, port = serving["listen"].rsplit(":", 1)
        connections = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(80)]
        gateway.wait_for("connections at their bound, more are closed", connections=bound)
        served = 0
        for connection in connections:
            connection.settimeout(10)
            try:
                # A server of HTTP/2 begins with its settings.
                served += bool(connection.recv(1))
            except ConnectionResetError:
                continue
        assert served == bound
        metrics = Scrape(serving["metrics_listen"])
        assert metrics.sum("unlatch_connections") == metrics.sum("unlatch_max_connections") == bound
        assert metrics.sum("unlatch_connections_full_seconds_total") >= 1
        opened.close()
        await until(lambda: Scrape(serving["metrics_listen"]).sum("unlatch_connections") == 0, "all have left")
        async with Client(serving["listen"], timeout=10.0) as client:
            np.testing.assert_array_equal(await client.identity(np.ones(3)), np.ones(3))
        gateway.stop()


async def test_too_few_descriptors_prevent_the_start() -> None:
    """With no descriptor left for a connection, a gateway ends with code 2 and says what to raise."""
    with limited(32) as gateway:
        assert gateway.wait(60) == 2, gateway
        assert any(re.search(r"the limit of 32 descriptors .* \(ulimit -n\)", line) for line in gateway.lines), gateway


async def test_soft_limit_is_raised_to_the_hard_limit(replica: str) -> None:
    """The usual soft limit does not bound connections where the hard limit is higher."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    runner = ("sh", "-c", 'ulimit -S -n 64; exec "$0" "$@"', sys.executable, "-m")
    flags = ("--listen", "127.0.0.1:0", *ANY_PORTS, "--replicas", replica)
    with Service("unlatch.gateway", *flags, runner=runner) as gateway:
        gateway.wait_for("serving", within=60)
        assert resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE) == (hard, hard)
        assert not any("fewer connections" in line for line in gateway.lines)
        gateway.stop()


async def test_all_addresses_of_both_kinds(replica: str) -> None:
    """A gateway on `[::]` is reached by IPv4, and by IPv6 where there is any, on each of its ports."""
    flags = [f"--{name}=[::]:0" for name in ("listen", "metrics-listen", "health-listen")]
    with Service("gateway", *flags, "--insecure", "--replicas", replica) as gateway:
        serving = gateway.wait_for("serving", within=60)
        gateway.wait_for("replica is ready")
        hosts = ["127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])]
        for host in hosts:
            ports = {name: serving[name].rpartition(":")[2] for name in ("listen", "metrics_listen", "health_listen")}
            async with Client(f"{host}:{ports['listen']}", timeout=10.0) as client:
                np.testing.assert_array_equal(await client.identity(np.ones(3)), np.ones(3))
            async with grpc.aio.insecure_channel(f"{host}:{ports['health_listen']}") as channel:
                check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
                assert await check(b"") == b"\x08\x01"
            assert Scrape(f"{host}:{ports['metrics_listen']}").sum("unlatch_replica_up") == 1
        gateway.stop()
