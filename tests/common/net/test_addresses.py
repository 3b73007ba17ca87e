"""The address that a service listens on decides what it must ask of its callers."""

import pytest

from unlatch.common.net.addresses import is_exposed
from unlatch.common.net.settings import Settings, parse
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings
from unlatch.supervisor import ServeSettings

TLS = ("--tls-cert", "cert.pem", "--tls-key", "key.pem")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:8001", "127.8.9.10:1", "localhost:8001", "[::1]:8001", "[::ffff:127.0.0.1]:8001"),
        *(
            "unix:/run/dispatcher.sock",
            "unix:dispatcher.sock",
            "unix:///run/dispatcher.sock",
            "unix-abstract:dispatcher",
        ),
    ],
)
def test_loopback_and_unix_sockets_are_not_exposed(address: str) -> None:
    """No other machine can reach loopback and Unix sockets."""
    assert not is_exposed(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "0.0.0.0:8001",
            "[::]:8001",
            "10.0.0.3:8001",
            "[fd00::1]:8001",
            "[::ffff:10.0.0.3]:8001",
            "host.example:8001",
        ),
        *(
            "host.example:8001",
            "*:8001",
            ":8001",
            "8001",
            "ipv4:127.0.0.1:8001",
            "vsock:1:8001",
            "dns:///localhost:8001",
            "",
        ),
    ],
)
def test_what_may_be_reached_from_elsewhere_is_exposed(address: str) -> None:
    """All other addresses count as exposed, also those that cannot be judged."""
    assert is_exposed(address)


@pytest.mark.parametrize("kind", [GatewaySettings, ComputeSettings, ServeSettings])
@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), "give --tls-cert and --tls-key; or give --insecure"),
        (TLS, "callers must authenticate, by --tls-client-ca"),
        (TLS[:2], "--tls-cert and --tls-key must be given together"),
        (("--tls-client-ca", "ca.pem"), "--tls-client-ca needs --tls-cert and --tls-key"),
    ],
)
def test_an_exposed_service_asks_for_tls_and_for_who_calls(
    kind: type[Settings], flags: tuple[str, ...], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exposed service does not start without TLS and known callers, and says which flags to give."""
    with pytest.raises(SystemExit) as ended:
        parse(kind, "unlatch service", ["--listen", "0.0.0.0:8001", *flags])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("unlatch service: --")
    assert wanted in told


@pytest.mark.parametrize("kind", [GatewaySettings, ComputeSettings, ServeSettings])
@pytest.mark.parametrize(
    "flags",
    [
        ("--listen", "0.0.0.0:8001", *TLS, "--tls-client-ca", "ca.pem"),
        ("--listen", "0.0.0.0:8001", "--insecure"),
        ("--listen", "0.0.0.0:8001", *TLS, "--insecure"),
        ("--listen", "127.0.0.1:8001"),
        ("--listen", "127.0.0.1:8001", *TLS),
        ("--listen", "unix:/run/dispatcher.sock"),
    ],
)
def test_what_is_asked_for_is_enough(kind: type[Settings], flags: tuple[str, ...]) -> None:
    """TLS and known callers are enough; so is --insecure, or an address that no other machine reaches."""
    assert parse(kind, "unlatch service", flags).listen == flags[1]
