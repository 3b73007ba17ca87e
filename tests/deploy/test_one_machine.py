"""deploy/systemd and deploy/compose: what they set exists, systemd takes the unit, and the service notifies it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.mesh import ROOT, Service
from tests.support.serve import START_SECONDS
from unlatch.common.net.settings import Settings, unknown_variables, variable
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings
from unlatch.unit.settings import ServeSettings

SYSTEMD = ROOT / "deploy" / "systemd"
UNIT = SYSTEMD / "unlatch.service"
COMPOSE: Any = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="this machine has no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds no fault in the unit, and its exposure is low."""
    assert ANALYZE is not None
    unit = tmp_path / UNIT.name
    # The command must exist.
    unit.write_text(UNIT.read_text().replace("/opt/unlatch/bin/unlatch", sys.executable))
    for check in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=25"]):
        checked = subprocess.run([ANALYZE, *check, str(unit)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert unit.name not in checked.stderr


def test_variables_of_the_unit_are_settings() -> None:
    """The unit and its file of variables, commented ones too, set settings that exist."""
    text = (SYSTEMD / "unlatch.env").read_text() + UNIT.read_text()
    found = re.findall(r"^#?(?:Environment=)?(UNLATCH_\w+)=", text, re.MULTILINE)
    assert len(found) > 5
    assert unknown_variables(found) == {}


def test_unit_gives_more_time_than_its_drains_take() -> None:
    """Systemd kills what is left only after the unit has had its drain time, and more."""
    text = UNIT.read_text()
    [drain], [stop] = re.findall(r"UNLATCH_DRAIN_SECONDS=(\d+)", text), re.findall(r"TimeoutStopSec=(\d+)", text)
    assert int(stop) > 2 * (int(drain) + 2)


@pytest.mark.parametrize(("service", "kind"), [("gateway", GatewaySettings), ("compute", ComputeSettings)])
def test_compose_sets_settings_of_its_services(service: str, kind: type[Settings]) -> None:
    """Variables of each service are its settings, and its stop takes longer than its drain."""
    found = COMPOSE["services"][service]
    assert set(found["environment"]) <= {variable(name) for name in kind.model_fields}
    assert found["image"].startswith(f"unlatch-{service}:")
    assert int(found["stop_grace_period"].removesuffix("s")) > kind.model_fields["drain_seconds"].default
    assert (found["read_only"], found["cap_drop"], found["tmpfs"]) == (True, ["ALL"], ["/tmp"])


def test_compose_publishes_ports_on_this_machine_only() -> None:
    """Without TLS no port is reachable from other machines, and each is the container's own."""
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == [f"127.0.0.1:{port}:{port}" for port in (8001, 8002, 8003)]


def test_static_scrapes_are_the_ports_of_serve() -> None:
    """Prometheus' target is the default address of the unit's metrics, under the job that rules know."""
    jobs = yaml.safe_load((SYSTEMD / "prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets == {"unlatch": [ServeSettings.model_fields["metrics_listen"].default]}


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_serve_notifies_its_supervisor(tmp_path: Path, kind: str) -> None:
    """A supervisor hears READY=1 once calls are served, and STOPPING=1 when the drain begins, by both kinds of name."""
    name = f"unlatch-test-{os.getpid()}" if kind == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(f"\0{name}" if kind == "abstract" else name)
        notices.settimeout(START_SECONDS)
        others = ("metrics-", "health-")
        ports = [f"--{other}listen=127.0.0.1:0" for other in others]
        environment = {"NOTIFY_SOCKET": f"@{name}" if kind == "abstract" else name}
        listen = f"--listen=unix:{tmp_path}/serve.sock"
        with Service("unlatch", "serve", listen, *ports, "--workers=1", environment=environment) as service:
            assert notices.recv(64) == b"READY=1"
            service.wait_for("replica is ready")
            service.signal(signal.SIGTERM)
            assert notices.recv(64) == b"STOPPING=1"
            assert service.wait() == 0, service
