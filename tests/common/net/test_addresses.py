"""The address that a service listens on decides what it must ask of its callers."""

from collections.abc import Mapping, Sequence

import pytest

from unlatch.common.net.addresses import has_no_such_port, is_exposed, is_private, is_url
from unlatch.common.net.settings import Settings, parse
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings
from unlatch.unit.settings import ServeSettings, services

TLS = ("--tls-cert", "cert.pem", "--tls-key", "key.pem")


def checked(kind: type[Settings], flags: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Check settings as the start of their command does. Those of `serve` are its gateway's and its replica's too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = parse(kind, "unlatch service", flags, environment)
        if isinstance(settings, ServeSettings):
            services(settings, environment)
    return settings


@pytest.mark.parametrize(
    "target",
    ["localhost", "localhost:1", "localhost:65535", "::1", "::99999", "[::1]:8001", "unix:/a:99999", "dns:///a:https"],
)
def test_targets_whose_port_exists_or_is_none(target: str) -> None:
    """A name of a port, an address without a port, and a Unix socket have no number that is no port, and are no URL."""
    assert not has_no_such_port(target)
    assert not is_url(target)


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
        checked(kind, ["--listen", "0.0.0.0:8001", *flags], {})
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(("unlatch service: --", "unlatch serve: --"))
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
    assert checked(kind, flags, {}).listen == flags[1]


@pytest.mark.parametrize("kind", [GatewaySettings, ServeSettings])
def test_tokens_are_enough_where_a_gateway_checks_them(kind: type[Settings]) -> None:
    """`serve` takes the gateway's variables, so tokens make callers authenticate there too."""
    tokens = {"UNLATCH_TOKEN_KEYS": "keys.json", "UNLATCH_TOKEN_ISSUER": "us", "UNLATCH_TOKEN_AUDIENCE": "unlatch"}
    assert checked(kind, ["--listen", "[::]:8001", *TLS], tokens).listen == "[::]:8001"


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1:8001", "localhost:8001", "[::1]:8001", "unix:/run/gateway.sock", "10.1.2.3:8001", "192.168.1.2"),
        *("dns:///gateway:8001", "ipv4:172.16.0.1:8001", "[fd00::1]:8001", "100.64.0.1:8001", "169.254.0.1:1"),
        *("gateway:8001", "gateway.mesh.svc:8001", "gateway.mesh.svc.cluster.local:8001", "vm.internal:8001"),
    ],
)
def test_what_no_public_proxy_reaches_is_private(target: str) -> None:
    """This machine, private networks, and names that only a private network resolves."""
    assert is_private(target)


@pytest.mark.parametrize("target", ["8.8.8.8:8001", "gateway.example.org:443", "dns:///example.org", "[2606::1]:1"])
def test_what_is_in_the_internet_is_not_private(target: str) -> None:
    """A public address, or a name that everybody resolves."""
    assert not is_private(target)
