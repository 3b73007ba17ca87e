"""Envoy with deploy/envoy/envoy.yaml, in which only its own address and the gateways' addresses are changed."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.support.mesh import ROOT
from tests.support.watching import wait_until

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
CONFIGURATION = ROOT / "deploy" / "envoy" / "envoy.yaml"
_NAME = "gateways.test"
_WITHIN_SECONDS = 20.0


class Envoy:
    """A running Envoy; callers use `address`."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path, admin: str) -> None:
        self._child = child
        self._log = log
        self._admin = admin
        listeners = self.asked("listeners?format=json")["listener_statuses"]
        self.address = _written(listeners[0]["local_address"])

    def asked(self, question: str) -> Any:
        """Ask Envoy's admin port."""
        with urlopen(f"http://{self._admin}/{question}", timeout=_WITHIN_SECONDS) as answer:
            return json.load(answer)

    @property
    def well(self) -> set[str]:
        """Return the gateways that Envoy takes for healthy."""
        (cluster,) = self.asked("clusters?format=json")["cluster_statuses"]
        hosts = cluster.get("host_statuses", ())
        return {
            _written(host["address"]) for host in hosts if host["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def wait_for(self, gateways: set[str]) -> None:
        """Wait until these gateways are the healthy ones."""
        wait_until(lambda: self.well == gateways, f"healthy are {gateways}; {self}", _WITHIN_SECONDS)

    @property
    def log(self) -> str:
        """Envoy's output: its own messages, and its access log."""
        return self._log.read_text()

    def __str__(self) -> str:
        state = self._child.poll()
        return f"Envoy ({'running' if state is None else f'exit code {state}'}) printed:\n{self.log[-4000:]}"


def configured(directory: Path, *, port: int, health_port: int, resolver: str, text: str = "") -> Path:
    """Return the shipped configuration for free ports, and for gateways at these ports of a name's addresses.

    `text` takes the place of the shipped file.
    """
    text = text or CONFIGURATION.read_text()
    host, _, resolver_port = resolver.rpartition(":")
    resolved = (
        '\n          typed_dns_resolver_config: { name: envoy.network.dns_resolver.cares, typed_config: { "@type": '
        "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig, resolvers: "
        f"[{{ socket_address: {{ address: {host}, port_value: {resolver_port}, protocol: UDP }} }}] }} }}"
    )
    for shipped, here in {
        "address: 127.0.0.1, port_value: 9901": "address: 127.0.0.1, port_value: 0",
        "address: 127.0.0.1, port_value: 8080": "address: 127.0.0.1, port_value: 0",
        "address: localhost, port_value: 8001": f"address: {_NAME}, port_value: {port}",
        "port_value: 8003": f"port_value: {health_port}",
        "dns_refresh_rate: 3s": f"dns_refresh_rate: 0.2s{resolved}",
    }.items():
        assert text.count(shipped) == 1, f"{shipped!r} is in envoy.yaml {text.count(shipped)} times"
        text = text.replace(shipped, here)
    path = directory / "envoy.yaml"
    path.write_text(text)
    return path


def validated(configuration: Path) -> str:
    """Return the output of `envoy --mode validate`. Fails where the configuration is wrong."""
    command = [str(ENVOY), "--mode", "validate", "-c", str(configuration)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@contextmanager
def running_envoy(configuration: Path) -> Iterator[Envoy]:
    """Run an Envoy that takes calls. It ends with code 0."""
    directory = configuration.parent
    log, admin = directory / "envoy.log", directory / "admin"
    command = [str(ENVOY), "-c", str(configuration), "--concurrency", "1", "--disable-hot-restart"]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, "--admin-address-path", str(admin)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(
            lambda: child.poll() is not None or "starting workers" in log.read_text(), "it starts", _WITHIN_SECONDS
        )
        assert child.poll() is None, log.read_text()
        yield Envoy(child, log, admin.read_text())
        child.send_signal(signal.SIGTERM)
        assert child.wait(_WITHIN_SECONDS) == 0, log.read_text()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def free_port(*hosts: str) -> int:
    """Return a port that is free on each of these addresses."""
    while True:
        with socket.socket() as first:
            first.bind((hosts[0], 0))
            port: int = first.getsockname()[1]
            if all(_is_free(host, port) for host in hosts[1:]):
                return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind((host, port))
        except OSError:
            return False
    return True


def _written(address: dict[str, Any]) -> str:
    where = address["socket_address"]
    return f"{where['address']}:{where['port_value']}"
