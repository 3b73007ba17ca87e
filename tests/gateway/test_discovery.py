"""Who is in the fleet: addresses and names, looked up at a real server; and who is left alone for a while."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest

from common.settings import parse
from gateway.discovery import Discovery, is_name, split_name
from gateway.ejection import CALL, LANE, Ejection
from gateway.settings import GatewaySettings
from tests.faults.watching import until
from tests.names import NameServer

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
    """With or without a server to ask."""
    assert is_name(target)
    assert split_name(target) == parts


@pytest.mark.parametrize("target", ["dns:///replicas", "dns:///:80", "dns:///replicas:0", "dns:///replicas:99999"])
async def test_name_without_a_port_is_a_wrong_setting(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused at the start, by the setting's name."""
    with pytest.raises(SystemExit):
        parse(GatewaySettings, "unlatch gateway", ["--replicas", target])
    told = capsys.readouterr().err
    assert "--replicas: " in told
    assert "dns:///name:port" in told


async def test_addresses_that_are_known_stay_where_there_are_too_many() -> None:
    """Of more addresses than are wanted some are chosen, and kept for as long as the name has them."""
    told: list[list[str]] = []

    def tell(addresses: Sequence[str]) -> None:
        told.append(list(addresses))

    with NameServer("127.0.0.2") as names:
        discovery = Discovery(["unix:/one", f"dns://{names.target}/many.test:80"], 0.05, 3)
        running = asyncio.ensure_future(discovery.run(tell))
        try:
            await until(lambda: told and len(told[-1]) == 2, "both are known")
            assert told == [["unix:/one"], ["unix:/one", "127.0.0.2:80"]]
            await asyncio.to_thread(names.answers, [f"127.0.0.{last}" for last in range(2, 10)])
            await until(lambda: len(told) == 3, "another is known")
            assert told[2][:2] == told[1]
            assert len(told[2]) == 3
            third = told[2][2]
            await asyncio.to_thread(names.answers, [third.partition(":")[0], "127.0.0.20"])
            await until(lambda: len(told) == 4, "one has gone, one has come")
            assert told[3] == ["unix:/one", third, "127.0.0.20:80"]
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def test_failures_in_a_row_eject_and_what_goes_well_between_them_does_not() -> None:
    """Five calls, or three lanes; for a second, then for two, for half a minute at most."""
    ejection = Ejection()
    assert not any(ejection.failed(CALL) for _ in range(4))
    ejection.succeeded()
    assert [ejection.failed(CALL) for _ in range(5)] == [False] * 4 + [True]
    assert not ejection.ejected
    assert [ejection.eject() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert ejection.ejected
    assert not ejection.trusted
    # What was on its way already tells nothing new.
    assert not ejection.failed(CALL)
    ejection.pardon()
    assert ejection.trusted
    lanes = Ejection()
    assert [lanes.failed(LANE) for _ in range(3)] == [False, False, True]


async def test_half_of_many_calls_that_fail_are_too_many() -> None:
    """Though never five follow one another."""
    ejection, failed = Ejection(), []
    for _ in range(20):
        ejection.succeeded()
        failed.append(ejection.failed(CALL))
    assert failed == [False] * 19 + [True]
