"""Membership of the fleet: addresses and names, looked up at a real DNS server, and ejection for a while."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import pytest

from tests.support.dns import NameServer
from tests.support.watching import until
from unlatch.common.net.settings import parse
from unlatch.gateway.fleet.discovery import Discovery, is_name, split_name
from unlatch.gateway.fleet.ejection import CALL, LANE, Ejection
from unlatch.gateway.fleet.subset import subset
from unlatch.gateway.settings import GatewaySettings

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("dns:///replicas.mesh.svc:8011", ("", "replicas.mesh.svc", "8011")),
        ("dns://127.0.0.1:5353/replicas:80", ("127.0.0.1:5353", "replicas", "80")),
        ("dns:replicas:1", ("", "replicas", "1")),
    ],
)
async def test_names_are_read_as_grpc_reads_them(target: str, parts: tuple[str, str, str]) -> None:
    """Names are read as gRPC reads them, with or without a server to ask."""
    assert is_name(target)
    assert split_name(target) == parts


@pytest.mark.parametrize("target", ["dns:///replicas", "dns:///:80", "dns:///replicas:0", "dns:///replicas:99999"])
async def test_name_without_a_port_is_a_wrong_setting(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a name is refused at the start, with the setting's name."""
    with pytest.raises(SystemExit):
        parse(GatewaySettings, "unlatch gateway", ["--replicas", target], {})
    told = capsys.readouterr().err
    assert f"--replicas {target}: " in told
    assert "dns:///name:port" in told


async def test_of_too_many_addresses_each_gateway_has_its_own() -> None:
    """A gateway's subset is the same each time.

    A replica that goes is replaced by one other, and comes back to its place.
    """
    told: list[list[str]] = []

    def tell(addresses: Sequence[str]) -> None:
        told.append(list(addresses))

    hosts = [f"127.0.0.{last}" for last in range(2, 10)]
    with NameServer("127.0.0.2") as names:
        target = f"dns://{names.target}/many.test:80"
        discovery = Discovery(["unix:/one", target], 0.05, 3, name="a", bound=True)
        running = asyncio.ensure_future(discovery.run(tell))
        try:
            await until(lambda: told and len(told[-1]) == 2, "both are known")
            assert told == [["unix:/one"], ["unix:/one", "127.0.0.2:80"]]
            await asyncio.to_thread(names.answers, hosts)
            await until(lambda: len(told[-1]) == 3, "there are too many")
            first = told[-1]
            assert first == subset("a", ["unix:/one", *(f"{host}:80" for host in hosts)], 3)
            gone = next(address for address in first if address.startswith("127."))
            left = [host for host in hosts if f"{host}:80" != gone]
            await asyncio.to_thread(names.answers, left)
            await until(lambda: gone not in told[-1], "one has gone")
            assert len(set(told[-1]) & set(first)) == 2
            await asyncio.to_thread(names.answers, hosts)
            await until(lambda: told[-1] == first, "it is back")
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def test_subsets_are_even_and_stable() -> None:
    """Replicas get their share of gateways, within chance. A replica that comes or goes changes one place at most."""
    replicas = [f"10.0.{number}.1:8011" for number in range(200)]
    gateways = [f"unlatch-gateway-{number}" for number in range(60)]
    shares = Counter(address for name in gateways for address in subset(name, replicas, 40))
    assert sum(shares.values()) == 60 * 40
    assert len(shares) == 200
    # Each has 12 on average, of a binomial distribution whose deviation is 3.1.
    assert max(shares.values()) < 12 + 5 * 3.1
    for name in gateways[:5]:
        own = set(subset(name, replicas, 40))
        for gone in replicas[:20]:
            without = set(subset(name, [address for address in replicas if address != gone], 40))
            assert len(without) == 40
            assert own - {gone} <= without
    assert subset("a", replicas, 200) == subset("b", replicas, 500) == replicas


async def test_subset_larger_than_the_bound_is_a_wrong_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names both settings."""
    with pytest.raises(SystemExit):
        parse(GatewaySettings, "unlatch gateway", ["--replica-subset", "65"], {})
    assert "--replica-subset 65 is more than --max-replicas 64" in capsys.readouterr().err


async def test_failures_in_a_row_eject_and_what_goes_well_between_them_does_not() -> None:
    """Five failed calls or three lost lanes in a row eject, for a second, then for two, for half a minute at most."""
    ejection = Ejection()
    assert not any(ejection.failed(CALL) for _ in range(4))
    ejection.succeeded()
    assert [ejection.failed(CALL) for _ in range(5)] == [False] * 4 + [True]
    assert not ejection.ejected
    assert [ejection.eject() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert ejection.ejected
    assert not ejection.trusted
    # Calls that were in flight already say nothing new.
    assert not ejection.failed(CALL)
    ejection.pardon()
    assert ejection.trusted
    lanes = Ejection()
    assert [lanes.failed(LANE) for _ in range(3)] == [False, False, True]


async def test_half_of_many_calls_that_fail_are_too_many() -> None:
    """Many calls of which half fail eject too, though no five of them are in a row."""
    ejection, failed = Ejection(), []
    for _ in range(20):
        ejection.succeeded()
        failed.append(ejection.failed(CALL))
    assert failed == [False] * 19 + [True]
